#include "parallel.h"

#include <dlfcn.h>
#include <link.h>

#include <atomic>
#include <cstring>
#include <string>

#include "isa.h"

namespace ds_cp {
namespace {

struct Pool {
  // GNU's entry points, which LLVM's and Intel's runtimes also have.
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_num)() = nullptr;
  int (*in_parallel)() = nullptr;
  bool whole() const { return parallel && thread_num && in_parallel; }
};

// OpenMP runtimes that are loaded now.
struct Loaded {
  std::string beside_torch;  // a runtime in torch's folder or its wheel's torch.libs
  std::string any;
};

bool is_runtime(const std::string& file) {
  for (const char* name : {"libgomp", "libiomp5", "libomp"})
    if (file.compare(0, std::strlen(name), name) == 0) return true;
  return false;
}

int look(struct dl_phdr_info* info, size_t, void* data) {
  auto& found = *static_cast<Loaded*>(data);
  const std::string path = info->dlpi_name ? info->dlpi_name : "";
  const auto slash = path.rfind('/');
  if (slash == std::string::npos || !is_runtime(path.substr(slash + 1))) return 0;
  if (path.find("/torch/lib/") != std::string::npos ||
      path.find("/torch.libs/") != std::string::npos)
    found.beside_torch = path;
  else if (found.any.empty())
    found.any = path;
  return 0;
}

int look_for_torch(struct dl_phdr_info* info, size_t, void* data) {
  if (!info->dlpi_name || !std::strstr(info->dlpi_name, "libtorch_cpu")) return 0;
  *static_cast<std::string*>(data) = info->dlpi_name;
  return 1;
}

Pool pool_of(void* handle) {
  Pool pool;
  pool.parallel =
      reinterpret_cast<decltype(pool.parallel)>(dlsym(handle, "GOMP_parallel"));
  pool.thread_num =
      reinterpret_cast<decltype(pool.thread_num)>(dlsym(handle, "omp_get_thread_num"));
  pool.in_parallel =
      reinterpret_cast<decltype(pool.in_parallel)>(dlsym(handle, "omp_in_parallel"));
  return pool;
}

// The runtime that torch was linked with, wherever it is; else one that looks like torch's.
Pool find_pool() {
  if (void* torch = torch_library()) {
    const Pool pool = pool_of(torch);
    if (pool.whole()) return pool;
  }
  Loaded loaded;
  dl_iterate_phdr(look, &loaded);
  const std::string& path = loaded.beside_torch.empty() ? loaded.any : loaded.beside_torch;
  if (path.empty()) return {};
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);  // kept: it is in use for good
  return handle ? pool_of(handle) : Pool{};
}

// Found once; looked for again while torch has not been imported yet.
const Pool& the_pool() {
  static const Pool none;
  static std::atomic<const Pool*> known{nullptr};
  if (const Pool* pool = known.load(std::memory_order_acquire)) return *pool;
  const Pool pool = find_pool();
  if (!pool.whole()) return none;
  static const Pool kept = pool;
  known.store(&kept, std::memory_order_release);
  return kept;
}

struct Job {
  std::atomic<int64_t> next{0};
  int64_t tasks;
  Body body;
  void* data;
  int (*thread_num)();
};

void work(void* argument) {
  auto& job = *static_cast<Job*>(argument);
  const int thread = job.thread_num();
  for (int64_t task; (task = job.next.fetch_add(1, std::memory_order_relaxed)) < job.tasks;)
    job.body(job.data, task, thread);
}

}  // namespace

void* torch_library() {
  std::string path;
  dl_iterate_phdr(look_for_torch, &path);
  return path.empty() ? nullptr : dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
}

bool has_pool() { return the_pool().whole(); }

void parallel_for(int64_t tasks, int threads, Body body, void* data) {
  if (threads > 1 && tasks > 1) {
    const Pool& pool = the_pool();
    if (pool.whole() && !pool.in_parallel()) {
      Job job;
      job.tasks = tasks;
      job.body = body;
      job.data = data;
      job.thread_num = pool.thread_num;
      pool.parallel(work, &job, static_cast<unsigned>(threads), 0);
      return;
    }
  }
  for (int64_t task = 0; task < tasks; ++task) body(data, task, 0);
}

}  // namespace ds_cp

// For tests: how many different threads took part in `tasks` tasks that each wait a little; below 0
// when there is no pool.
DS_CP_EXPORT int64_t ds_cp_threads_seen(int64_t tasks, int64_t threads) {
  if (!ds_cp::has_pool()) return -1;
  std::atomic<uint64_t> seen{0};
  ds_cp::parallel_for(tasks, static_cast<int>(threads), [&](int64_t, int thread) {
    seen |= uint64_t{1} << (thread & 63);
    for (volatile int i = 0; i < 100000; i = i + 1) {
    }
  });
  return __builtin_popcountll(seen.load());
}
