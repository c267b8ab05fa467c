// Messages between processes of one host, through memory that they share.
//
// A channel joins the members of one group on one host. For each ordered pair of members it has a
// ring of bytes with one writer and one reader. A message is a header of one cache line and its
// payload, padded to lines; one that is longer than the ring goes through it in pieces. Each pair
// keeps its messages in order. `post` starts an exchange: it queues its messages and copies what
// fits. `wait` moves everything that is queued until the exchange is done, so that two members that
// both send much do not wait for each other.
//
// Who waits looks again and again, then sleeps in the kernel (futex) and is woken by the peer that
// moves what it waits for, which takes longer than many an exchange. How long it looks follows from
// how long waits were (`Habit`). None yields: who yields to a busy process gets the core back
// milliseconds later, who is woken gets it at once. Asleep it looks after its peers' lives every
// POLL_MS. What is read from the shared memory is checked before it is used.
//
// Plain C ABI, no exceptions across it. A channel may be used by several threads, one at a time, and
// closed by any of them meanwhile: that unmaps the memory when the call in flight has ended, and later
// calls find it closed. What they use lives until the last reference to the channel is given up.

#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdint>
#include <cstring>
#include <deque>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

#include "isa.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#define RELAX() _mm_pause()
#elif defined(__aarch64__)
#define RELAX() asm volatile("yield" ::: "memory")
#else
#define RELAX() std::atomic_signal_fence(std::memory_order_seq_cst)
#endif

namespace {

constexpr uint64_t LINE = 64;                       // bytes of a cache line
constexpr uint64_t PAGE = 4096;                     // bytes of the parts of the layout
constexpr uint64_t MAGIC = 0x3130'6d68'7370'6364;   // "dcpshm01"
constexpr uint64_t START = 0x676d'6770'6364'7374;   // first word of a message
constexpr uint64_t PIECE = 128 * 1024;              // bytes after which the other side is told
constexpr uint64_t PAST_CACHE = 4096;               // bytes from which the writer's cache is left out
constexpr int MAX_MEMBERS = 64;                     // one bit each in a sleeper's masks
constexpr int POLL_MS = 50;                         // between looks at the peers' lives and at signals
constexpr int64_t POLL_NS = POLL_MS * int64_t(1'000'000);
constexpr int LOOKS = 32;                           // looks between two looks at the clock
constexpr int64_t LEAST_LOOK_NS = 50'000;           // about what falling asleep and waking takes
constexpr int MOST_MISSES = 31;                     // twice the waits in a row that do not look

enum Result : int {
  DONE = 0,
  SILENT = 1,       // the time limit passed
  GONE = 2,         // a peer's process has ended
  CLOSED = 3,       // a peer has closed the channel
  DIFFERENT = 4,    // a peer sent a message of another size than is expected
  BROKEN = 5,       // the shared memory holds what no writer writes
  INTERRUPTED = 6,  // a signal came, or may have come to another thread; wait again
  SHUT = 7,         // this side has closed the channel
};

struct alignas(LINE) Head {
  uint64_t magic, members, ring_bytes;
  uint8_t token[16];
};

// What the others see of a member.
struct alignas(LINE) Member {
  std::atomic<uint32_t> bell;         // futex word; it grows when something came that was wanted
  std::atomic<uint32_t> closed;       // 1: the member has left
  std::atomic<uint64_t> wants_data;   // asleep until one of these members (bits) sends
  std::atomic<uint64_t> wants_space;  // asleep until one of these members makes room
};

// One direction of a pair. Positions count bytes since the beginning, in whole lines.
struct Ring {
  alignas(LINE) std::atomic<uint64_t> head;  // written up to here; the writer's
  std::atomic<uint64_t> base;                // the position that lies at the ring's first byte
  alignas(LINE) std::atomic<uint64_t> tail;  // read up to here; the reader's
};

struct alignas(LINE) Start {
  uint64_t magic, bytes, number;
};

static_assert(sizeof(Start) == LINE && sizeof(Member) == LINE && sizeof(Ring) == 2 * LINE);
static_assert(std::atomic<uint64_t>::is_always_lock_free);

uint64_t up(uint64_t n, uint64_t unit) { return (n + unit - 1) / unit * unit; }

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}

long futex(std::atomic<uint32_t>* word, int op, uint32_t value, const timespec* limit) {
  return syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), op, value, limit, nullptr, 0);
}

// Copy to whole lines, which the reader has in its cache from last time: past my own cache, else every
// line would come over here only to be written.
void hand_over(uint8_t* to, const uint8_t* from, uint64_t bytes) {
  uint64_t at = 0;
#if defined(__SSE2__)
  if (bytes >= PAST_CACHE) {
    for (; at + LINE <= bytes; at += LINE)
      for (uint64_t i = at; i < at + LINE; i += 16)
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    _mm_sfence();
  }
#endif
  std::memcpy(to + at, from + at, bytes - at);
}

struct Message {  // as the caller packs it
  int64_t peer;   // index of the member
  int64_t sends;  // 1: to the peer; 0: from it
  uint8_t* data;
  uint64_t bytes;
};

struct Op {
  uint8_t* data;
  uint64_t bytes, moved;
  int64_t exchange;
  bool started;
};

struct Queue {
  std::deque<Op> ops;
  uint64_t at = 0;      // my own position: head where I write, tail where I read
  uint64_t number = 0;  // of the message at the front
};

// For how long a wait looks before it sleeps: twice as long as waits usually are, and not at all where
// that is more than `most_ns`. Waits that slept teach it too. Looks in vain, one after the other, mean
// that the peer wants this very core, or that waits differ much: ever more waits then sleep at once.
struct Habit {
  int64_t most_ns = 0;
  int64_t usual_ns = 0;      // most waits are no longer: longer ones raise it fast, others lower it slowly
  int misses = 0, rest = 0;  // after looks in vain; waits that will sleep at once

  int64_t look_ns() {
    if (rest) return --rest, 0;
    return usual_ns > most_ns ? 0 : std::min(most_ns, std::max(2 * usual_ns, LEAST_LOOK_NS));
  }
  void in_vain() {
    misses = std::min(2 * misses + 1, MOST_MISSES);
    rest = misses / 2;
  }
  void learn(int64_t waited_ns) {
    int64_t more = std::min(waited_ns, 2 * most_ns) - usual_ns;
    usual_ns += more > 0 ? more / 2 : more / 16;
  }
};

struct Channel {
  uint8_t* memory;
  uint64_t mapped;  // bytes of the memory; 0 when it is not mapped any more
  int members, me;
  uint64_t ring_bytes;
  std::vector<int> pidfds;  // by member; -1 for me
  std::vector<Queue> out, in;
  std::unordered_map<int64_t, int64_t> open;  // exchange -> messages that are not through
  std::mutex busy;   // held by what moves messages
  std::mutex there;  // held by what looks at the members only, and for a moment
  std::atomic<bool> shut{false};
  Habit habit;
  int64_t waiting = 0;               // the exchange that is waited for, or was until a signal
  int64_t blocked_at = 0, longest = 0;  // of that wait: since when nothing moves; the longest such time
  int culprit = -1;
  uint64_t expected = 0, found = 0;
  Result fault = DONE;  // DIFFERENT or BROKEN: no message can follow, so nothing is moved any more
  int faulty = -1;      // the member that it is about

  Member& member(int i) { return reinterpret_cast<Member*>(memory + PAGE)[i]; }
  Ring& ring(int from, int to) {
    uint64_t rings = PAGE + up(members * sizeof(Member), PAGE);
    return reinterpret_cast<Ring*>(memory + rings)[from * members + to];
  }
  uint8_t* bytes_of(int from, int to) {
    uint64_t data = PAGE + up(members * sizeof(Member), PAGE) +
                    up(uint64_t(members) * members * sizeof(Ring), PAGE);
    return memory + data + (uint64_t(from) * members + to) * ring_bytes;
  }
  int fail(Result why, int who) {
    culprit = who;
    return why;
  }

  // After a position was published: the peer sleeps until this, or looks at it before it sleeps.
  void tell(int peer, bool data) {
    std::atomic_thread_fence(std::memory_order_seq_cst);
    Member& other = member(peer);
    auto& mask = data ? other.wants_data : other.wants_space;
    if (mask.load(std::memory_order_relaxed) & (uint64_t(1) << me)) {
      other.bell.fetch_add(1, std::memory_order_seq_cst);
      futex(&other.bell, FUTEX_WAKE, INT_MAX, nullptr);
    }
  }

  void finish(Queue& queue) {
    auto found = open.find(queue.ops.front().exchange);
    if (found != open.end()) --found->second;
    queue.ops.pop_front();
    ++queue.number;
  }

  int push(int peer, bool& moved) {
    Queue& queue = out[peer];
    Ring& r = ring(me, peer);
    uint8_t* bytes = bytes_of(me, peer);
    while (!queue.ops.empty()) {
      Op& op = queue.ops.front();
      uint64_t tail = r.tail.load(std::memory_order_acquire);
      uint64_t base = r.base.load(std::memory_order_relaxed);
      uint64_t used = queue.at - tail;
      if (used > ring_bytes || tail % LINE || base % LINE || base > queue.at)
        return fail(BROKEN, peer);
      if (used == 0 && base != queue.at) {  // empty: begin anew where the cache is warm
        base = queue.at;
        r.base.store(base, std::memory_order_relaxed);
      }
      uint64_t room = ring_bytes - used;
      if (room == 0) break;
      if (!op.started) {
        Start start{};
        start.magic = START, start.bytes = op.bytes, start.number = queue.number;
        std::memcpy(bytes + (queue.at - base) % ring_bytes, &start, sizeof start);
        op.started = true;
        queue.at += LINE, room -= LINE;
      }
      uint64_t n = std::min(std::min(room, PIECE), op.bytes - op.moved);
      uint64_t offset = (queue.at - base) % ring_bytes;
      uint64_t first = std::min(n, ring_bytes - offset);
      hand_over(bytes + offset, op.data + op.moved, first);
      hand_over(bytes, op.data + op.moved + first, n - first);
      op.moved += n;
      queue.at += up(n, LINE);
      moved = true;
      if (op.moved == op.bytes) finish(queue);
      r.head.store(queue.at, std::memory_order_release);
      tell(peer, true);
    }
    return DONE;
  }

  int pull(int peer, bool& moved) {
    Queue& queue = in[peer];
    Ring& r = ring(peer, me);
    uint8_t* bytes = bytes_of(peer, me);
    while (!queue.ops.empty()) {
      Op& op = queue.ops.front();
      uint64_t head = r.head.load(std::memory_order_acquire);
      uint64_t there = head - queue.at;
      if (there == 0) break;
      uint64_t base = r.base.load(std::memory_order_relaxed);
      if (there > ring_bytes || head % LINE || base % LINE || base > queue.at)
        return fail(BROKEN, peer);
      if (!op.started) {
        Start start;
        std::memcpy(&start, bytes + (queue.at - base) % ring_bytes, sizeof start);
        if (start.magic != START || start.number != queue.number) return fail(BROKEN, peer);
        if (start.bytes != op.bytes) {
          expected = op.bytes, found = start.bytes;
          return fail(DIFFERENT, peer);
        }
        op.started = true;
        queue.at += LINE, there -= LINE;
      }
      uint64_t n = std::min(std::min(there, PIECE), op.bytes - op.moved);
      uint64_t offset = (queue.at - base) % ring_bytes;
      uint64_t first = std::min(n, ring_bytes - offset);
      std::memcpy(op.data + op.moved, bytes + offset, first);
      std::memcpy(op.data + op.moved + first, bytes, n - first);
      op.moved += n;
      queue.at += up(n, LINE);
      moved = true;
      if (op.moved == op.bytes) finish(queue);
      r.tail.store(queue.at, std::memory_order_release);
      tell(peer, false);
    }
    return DONE;
  }

  // Move what can be moved, of all exchanges. After a fault never again: the caller was told, and
  // may have given up the data of exchanges that are still queued.
  int progress(bool& moved) {
    if (fault) return fail(fault, faulty);
    for (int peer = 0; peer < members; ++peer) {
      int why = out[peer].ops.empty() ? DONE : push(peer, moved);
      if (!why && !in[peer].ops.empty()) why = pull(peer, moved);
      if (why) {
        fault = Result(why), faulty = peer;
        return why;
      }
    }
    return DONE;
  }

  bool done(int64_t exchange) {
    auto found = open.find(exchange);
    return found == open.end() || found->second == 0;
  }

  static bool holds(const Queue& queue, int64_t exchange) {
    for (const Op& op : queue.ops)
      if (op.exchange == exchange) return true;
    return false;
  }

  // Peers that `exchange` still waits for and that will not answer.
  int missing(int64_t exchange, bool look) {
    for (int peer = 0; peer < members; ++peer) {
      if (!holds(out[peer], exchange) && !holds(in[peer], exchange)) continue;
      if (member(peer).closed.load(std::memory_order_acquire)) return fail(CLOSED, peer);
      if (!look || pidfds[peer] < 0) continue;
      pollfd life{pidfds[peer], POLLIN, 0};
      if (::poll(&life, 1, 0) > 0) return fail(GONE, peer);
    }
    return DONE;
  }

  int settle(int64_t exchange, int why) {  // what it sent last may have arrived meanwhile
    bool moved = true;
    int who = culprit;
    while (moved) {
      moved = false;
      if (int other = progress(moved)) return other;
    }
    if (done(exchange)) return DONE;
    culprit = who;
    return why;
  }

  int wait(int64_t exchange, int64_t limit_ns) {
    const int64_t begin = now_ns(), deadline = begin + limit_ns;
    if (waiting != exchange) waiting = exchange, blocked_at = longest = 0;
    bool looking = false;  // not where a wait goes on that a signal interrupted: it has looked
    int64_t look_until = 0;
    int looks = 0;
    for (;;) {
      bool moved = false;
      if (int why = progress(moved)) return why;
      bool through = done(exchange);
      if (moved || through) {
        if (looking) habit.misses = 0;
        unblocked();
        looking = false;
      }
      if (through) {
        if (longest) habit.learn(longest);
        waiting = 0;
        return DONE;
      }
      if (shut.load(std::memory_order_relaxed)) return fail(SHUT, me);
      if (moved) {
        if (now_ns() - begin >= POLL_NS) return INTERRUPTED;
        continue;
      }
      if (!blocked_at) {
        blocked_at = now_ns();
        look_until = blocked_at + habit.look_ns();
        looking = look_until > blocked_at;
      }
      if (looking) {
        RELAX();
        if (++looks % LOOKS || now_ns() < look_until) continue;
        looking = false;
        habit.in_vain();
      }
      if (int why = sleep(exchange, deadline)) return why;
      unblocked();
    }
  }

  void unblocked() {
    if (blocked_at) longest = std::max(longest, now_ns() - blocked_at);
    blocked_at = 0;
  }

  // Until a peer rings or POLL_MS pass. These end in INTERRUPTED: a signal wakes one thread, any of
  // the process, and the caller may have to look at it.
  int sleep(int64_t exchange, int64_t deadline) {
    Member& mine = member(me);
    uint32_t bell = mine.bell.load(std::memory_order_acquire);
    uint64_t data = 0, space = 0;
    for (int peer = 0; peer < members; ++peer) {
      if (!in[peer].ops.empty()) data |= uint64_t(1) << peer;
      if (!out[peer].ops.empty()) space |= uint64_t(1) << peer;
    }
    mine.wants_data.store(data, std::memory_order_relaxed);
    mine.wants_space.store(space, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    bool moved = false;
    int why = progress(moved);
    if (!why && !moved) {
      why = missing(exchange, false);
      if (why) {
        why = settle(exchange, why);
      } else if (!shut.load(std::memory_order_seq_cst)) {
        int64_t left = std::min(deadline - now_ns(), POLL_NS);
        timespec limit{left / 1'000'000'000, left % 1'000'000'000};
        bool slept_out = left <= 0;
        if (!slept_out && futex(&mine.bell, FUTEX_WAIT, bell, &limit) < 0) {
          if (errno == EINTR) why = INTERRUPTED;
          slept_out = errno == ETIMEDOUT;
        }
        if (slept_out) {
          if ((why = missing(exchange, true))) {
            why = settle(exchange, why);
          } else if (now_ns() >= deadline) {
            why = settle(exchange, fail(SILENT, first_awaited(exchange)));
          } else {
            why = INTERRUPTED;
          }
        }
      }
    }
    mine.wants_data.store(0, std::memory_order_relaxed);
    mine.wants_space.store(0, std::memory_order_relaxed);
    return why;
  }

  int first_awaited(int64_t exchange) {
    for (int peer = 0; peer < members; ++peer)
      if (holds(in[peer], exchange) || holds(out[peer], exchange)) return peer;
    return -1;
  }
};

}  // namespace

// Bytes of the memory of a channel; 0 when there can be no such channel.
DS_CP_EXPORT uint64_t ds_cp_shm_bytes(int members, uint64_t ring_bytes) {
  if (members < 2 || members > MAX_MEMBERS || ring_bytes < 2 * LINE || ring_bytes % PAGE ||
      ring_bytes > (uint64_t(1) << 32))
    return 0;
  return PAGE + up(members * sizeof(Member), PAGE) +
         up(uint64_t(members) * members * sizeof(Ring), PAGE) +
         uint64_t(members) * members * ring_bytes;
}

// Map the memory behind a descriptor, which may be closed then. Neither child processes nor a dump of
// this one get it. nullptr when that cannot be, or when there is less than `bytes`.
DS_CP_EXPORT void* ds_cp_shm_map(int fd, uint64_t bytes) {
  struct stat found;
  if (fstat(fd, &found) || found.st_size < 0 || uint64_t(found.st_size) < bytes) return nullptr;
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (memory == MAP_FAILED) return nullptr;
  madvise(memory, bytes, MADV_DONTFORK);
  madvise(memory, bytes, MADV_DONTDUMP);
  return memory;
}

DS_CP_EXPORT void ds_cp_shm_unmap(void* memory, uint64_t bytes) { munmap(memory, bytes); }

// Make a channel of zeroed memory. `token`: 16 bytes that the others know.
DS_CP_EXPORT void ds_cp_shm_format(void* memory, int members, uint64_t ring_bytes, const uint8_t* token) {
  Head head{};
  head.magic = MAGIC, head.members = members, head.ring_bytes = ring_bytes;
  std::memcpy(head.token, token, sizeof head.token);
  std::memcpy(memory, &head, sizeof head);
}

// Take a seat. `pidfds`: one for each member, -1 for me; `look_ns`: the most that a wait looks. nullptr
// when the memory is not that channel; else the memory is the channel's, which unmaps it.
DS_CP_EXPORT void* ds_cp_shm_open(void* memory, int members, int me, uint64_t ring_bytes, const uint8_t* token,
                     const int* pidfds, int64_t look_ns) {
  Head head;
  std::memcpy(&head, memory, sizeof head);
  if (head.magic != MAGIC || head.members != uint64_t(members) || head.ring_bytes != ring_bytes ||
      std::memcmp(head.token, token, sizeof head.token) || me < 0 || me >= members ||
      !ds_cp_shm_bytes(members, ring_bytes))
    return nullptr;
  Channel* channel = new (std::nothrow) Channel;
  if (!channel) return nullptr;
  channel->memory = static_cast<uint8_t*>(memory);
  channel->mapped = ds_cp_shm_bytes(members, ring_bytes);
  channel->members = members;
  channel->me = me;
  channel->ring_bytes = ring_bytes;
  channel->habit.most_ns = look_ns;
  channel->pidfds.assign(pidfds, pidfds + members);
  channel->out.resize(members);
  channel->in.resize(members);
  return channel;
}

// Start an exchange of `count` messages, each of at least one byte; `exchange`: its number, above 0
// and new. Returns 0 when it is through already, else its number (to wait for), or minus a Result.
// The data stays where it is until then; after minus a Result it is not touched any more.
DS_CP_EXPORT int64_t ds_cp_shm_post(void* handle, int64_t exchange, const Message* messages,
                                    int64_t count) {
  Channel& channel = *static_cast<Channel*>(handle);
  std::lock_guard<std::mutex> lock(channel.busy);
  if (channel.shut) return -channel.fail(SHUT, channel.me);
  if (channel.fault) return -channel.fail(channel.fault, channel.faulty);
  for (int64_t i = 0; i < count; ++i) {
    const Message& m = messages[i];
    if (m.peer < 0 || m.peer >= channel.members || m.peer == channel.me || !m.bytes)
      return -channel.fail(BROKEN, channel.me);
  }
  channel.open[exchange] = count;
  for (int64_t i = 0; i < count; ++i) {
    const Message& m = messages[i];
    auto& queue = (m.sends ? channel.out : channel.in)[m.peer];
    queue.ops.push_back(Op{m.data, m.bytes, 0, exchange, false});
  }
  bool moved = false;
  if (int why = channel.progress(moved)) return -why;
  if (!channel.done(exchange)) return exchange;
  channel.open.erase(exchange);
  return 0;
}

// Wait for an exchange, at most so long. Returns a Result; every one but INTERRUPTED ends it, which
// comes every POLL_MS at least.
DS_CP_EXPORT int ds_cp_shm_wait(void* handle, int64_t exchange, int64_t limit_ns) {
  Channel& channel = *static_cast<Channel*>(handle);
  std::lock_guard<std::mutex> lock(channel.busy);
  if (channel.shut) return channel.fail(SHUT, channel.me);
  int why = channel.wait(exchange, limit_ns);
  if (why == DONE) channel.open.erase(exchange);
  return why;
}

// Move what can be moved. Returns the messages that still wait to be sent, or minus a Result.
DS_CP_EXPORT int64_t ds_cp_shm_pump(void* handle) {
  Channel& channel = *static_cast<Channel*>(handle);
  std::lock_guard<std::mutex> lock(channel.busy);
  if (channel.shut) return -channel.fail(SHUT, channel.me);
  bool moved = false;
  if (int why = channel.progress(moved)) return -why;
  int64_t left = 0;
  for (const Queue& queue : channel.out) left += queue.ops.size();
  return left;
}

// 1 when a member's process has ended or a member has closed the channel, else 0; `who` gets it. Minus
// a Result when this side has closed it.
DS_CP_EXPORT int ds_cp_shm_lost(void* handle, int* who) {
  Channel& channel = *static_cast<Channel*>(handle);
  std::lock_guard<std::mutex> lock(channel.there);
  if (channel.shut) return -SHUT;
  for (int peer = 0; peer < channel.members; ++peer) {
    if (peer == channel.me) continue;
    pollfd life{channel.pidfds[peer], POLLIN, 0};
    bool gone = channel.pidfds[peer] >= 0 && ::poll(&life, 1, 0) > 0;
    if (gone || channel.member(peer).closed.load(std::memory_order_acquire)) {
      *who = peer;
      return 1;
    }
  }
  return 0;
}

// Of the last Result that was not DONE: the member that it is about; for DIFFERENT the sizes.
DS_CP_EXPORT int ds_cp_shm_culprit(void* handle, uint64_t* expected, uint64_t* found) {
  Channel& channel = *static_cast<Channel*>(handle);
  *expected = channel.expected;
  *found = channel.found;
  return channel.culprit;
}

// Leave: wakes a thread of mine that waits and every member that sleeps, and unmaps the memory when
// no call uses it any more. Calls that follow, of any thread, find the channel closed.
DS_CP_EXPORT void ds_cp_shm_close(void* handle) {
  Channel& channel = *static_cast<Channel*>(handle);
  std::unique_lock<std::mutex> looks(channel.there);
  if (channel.shut.exchange(true)) return;
  channel.member(channel.me).closed.store(1, std::memory_order_seq_cst);
  for (int i = 0; i < channel.members; ++i) {
    Member& member = channel.member(i);
    member.bell.fetch_add(1, std::memory_order_seq_cst);
    futex(&member.bell, FUTEX_WAKE, INT_MAX, nullptr);
  }
  looks.unlock();  // who looks from now on sees that it is shut
  std::lock_guard<std::mutex> lock(channel.busy);
  munmap(channel.memory, channel.mapped);
  channel.mapped = 0;
}

// Give the channel up, closed or not. No call may be under way, and none may follow.
DS_CP_EXPORT void ds_cp_shm_free(void* handle) {
  Channel* channel = static_cast<Channel*>(handle);
  if (channel->mapped) munmap(channel->memory, channel->mapped);
  delete channel;
}
