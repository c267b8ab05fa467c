// Threads: torch's own OpenMP pool, found at run time, so that there is no second pool.
#pragma once

#include <stdint.h>

namespace ds_cp {

// Runs body(data, task, thread) for every task in [0, tasks), by up to `threads` threads (the
// caller's torch.get_num_threads(), so that the pool keeps its size). Tasks are handed out one by one,
// in order, to whoever is free: a task's result must not depend on who does it. `thread` is below
// `threads`. Without a pool, or with one thread or task, everything runs here.
using Body = void (*)(void* data, int64_t task, int thread);
void parallel_for(int64_t tasks, int threads, Body body, void* data);

template <class F>
void parallel_for(int64_t tasks, int threads, F&& f) {
  parallel_for(
      tasks, threads,
      [](void* data, int64_t task, int thread) { (*static_cast<F*>(data))(task, thread); }, &f);
}

// torch's library, with what it was linked with, for dlsym; null when it is not loaded.
void* torch_library();

// Whether a pool was found.
bool has_pool();

}  // namespace ds_cp
