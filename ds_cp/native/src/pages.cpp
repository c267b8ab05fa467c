// Writing of tokens into packed pages, and the merge of partials.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "isa.h"
#include "parallel.h"

namespace {

using ds_cp::parallel_for;

constexpr int64_t kTokens = 64;       // tokens of one task of a write
constexpr int64_t kSerial = 1 << 16;  // numbers; below, waking threads costs more

// What Python packs, field by field.
struct WriteArgs {
  char* pages;
  int64_t page_bytes, num_blocks;
  int64_t element, kv_heads, k_dim, v_dim, block_size;
  const char *k, *v;
  int64_t k_token, k_head, v_token, v_head;  // elements
  const int64_t *blocks, *places;
  int64_t tokens, threads;
};

struct MergeArgs {
  float* out;
  int64_t out_token, out_head;
  float* lse;
  int64_t lse_token, lse_head;
  int64_t into_tokens;
  const float* part_out;
  int64_t part_out_token, part_out_head;
  const float* part_lse;
  int64_t part_lse_token, part_lse_head;
  const int64_t* rows;  // null: row r is r
  int64_t num_rows, heads, dim, threads;
};

// Tokens that go to places one after the other in one block: keys [k_dim / p][block_size][p].
template <class E, class Word, int P>
void write_keys(E* block, const WriteArgs& args, const E* k, int64_t place, int64_t tokens) {
  for (int64_t d = 0; d < args.k_dim / P; ++d) {
    E* to = block + (d * args.block_size + place) * P;
    for (int64_t t = 0; t < tokens; ++t) {
      Word pair;
      std::memcpy(&pair, k + t * args.k_token + d * P, sizeof(Word));
      std::memcpy(to + t * P, &pair, sizeof(Word));
    }
  }
}

// The same for values [block_size / p][v_dim][p].
template <class E, int P>
void write_values(E* block, const WriteArgs& args, const E* v, int64_t place, int64_t tokens) {
  for (int64_t t = 0; t < tokens;) {
    E* to = block + (place + t) / P * args.v_dim * P;
    const E* from = v + t * args.v_token;
    if (P == 2 && (place + t) % 2 == 0 && t + 1 < tokens) {
      const E* next = from + args.v_token;
      for (int64_t d = 0; d < args.v_dim; ++d) {
        to[2 * d] = from[d];
        to[2 * d + 1] = next[d];
      }
      t += 2;
      continue;
    }
    to += (place + t) % P;
    for (int64_t d = 0; d < args.v_dim; ++d) to[d * P] = from[d];
    ++t;
  }
}

template <class E, class Word, int P>
void write(const WriteArgs& args) {
  const int64_t chunks = (args.tokens + kTokens - 1) / kTokens;
  const int64_t numbers = args.tokens * args.kv_heads * (args.k_dim + args.v_dim);
  const int threads = numbers < kSerial ? 1 : static_cast<int>(args.threads);
  // A chunk may end within a pair of values, whose halves two threads then write: they are numbers of
  // their own, written one by one, so that neither takes the other's away.
  parallel_for(args.kv_heads * (threads > 1 ? chunks : 1), threads, [&](int64_t task, int) {
    const int64_t head = task % args.kv_heads, chunk = task / args.kv_heads;
    int64_t t = threads > 1 ? chunk * kTokens : 0;
    const int64_t end = threads > 1 ? std::min(args.tokens, t + kTokens) : args.tokens;
    const E* k = reinterpret_cast<const E*>(args.k) + head * args.k_head;
    const E* v = reinterpret_cast<const E*>(args.v) + head * args.v_head;
    while (t < end) {
      int64_t run = 1;
      while (t + run < end && args.blocks[t + run] == args.blocks[t] &&
             args.places[t + run] == args.places[t] + run)
        ++run;
      E* block = reinterpret_cast<E*>(args.pages + args.blocks[t] * args.page_bytes);
      write_keys<E, Word, P>(block + head * args.block_size * args.k_dim, args,
                             k + t * args.k_token, args.places[t], run);
      write_values<E, P>(block + args.kv_heads * args.block_size * args.k_dim +
                             head * args.block_size * args.v_dim,
                         args, v + t * args.v_token, args.places[t], run);
      t += run;
    }
  });
}

}  // namespace

// Returns 0, or 1 when a block or a place is not there (then nothing was written), or 2 for elements
// of another size.
DS_CP_EXPORT int64_t ds_cp_write_pages(const WriteArgs* args) {
  for (int64_t t = 0; t < args->tokens; ++t)
    if (args->blocks[t] < 0 || args->blocks[t] >= args->num_blocks || args->places[t] < 0 ||
        args->places[t] >= args->block_size)
      return 1;
  if (args->element == 2 && args->k_dim % 2 == 0 && args->block_size % 2 == 0)
    write<uint16_t, uint32_t, 2>(*args);
  else if (args->element == 4)
    write<uint32_t, uint32_t, 1>(*args);
  else
    return 2;
  return 0;
}

// Folds a partial into rows of another, in place. Returns 0, or 1 when a row is not there (then nothing
// was written).
DS_CP_EXPORT int64_t ds_cp_merge_rows(const MergeArgs* given) {
  const MergeArgs& args = *given;
  for (int64_t r = 0; args.rows && r < args.num_rows; ++r)
    if (args.rows[r] < 0 || args.rows[r] >= args.into_tokens) return 1;
  if (!args.rows && args.num_rows > args.into_tokens) return 1;
  const int threads =
      args.num_rows * args.heads * args.dim < kSerial ? 1 : static_cast<int>(args.threads);
  const int64_t each = threads > 1 ? 8 : args.num_rows;  // rows of a task
  const int64_t tasks = each ? (args.num_rows + each - 1) / each : 0;
  parallel_for(tasks, threads, [&](int64_t task, int) {
    for (int64_t r = task * each; r < std::min(args.num_rows, (task + 1) * each); ++r) {
      const int64_t row = args.rows ? args.rows[r] : r;
      for (int64_t h = 0; h < args.heads; ++h) {
        float& a = args.lse[row * args.lse_token + h * args.lse_head];
        const float b = args.part_lse[r * args.part_lse_token + h * args.part_lse_head];
        float* out = args.out + row * args.out_token + h * args.out_head;
        const float* from = args.part_out + r * args.part_out_token + h * args.part_out_head;
        if (b == -INFINITY) {
          if (a == -INFINITY) std::memset(out, 0, args.dim * sizeof(float));
          continue;
        }
        if (a == -INFINITY) {
          std::memcpy(out, from, args.dim * sizeof(float));
          a = b;
          continue;
        }
        const float top = a > b ? a : b;
        const float x = std::exp(a - top), y = std::exp(b - top), sum = x + y;
        const float mine = x / sum, theirs = y / sum;
        for (int64_t d = 0; d < args.dim; ++d) out[d] = out[d] * mine + from[d] * theirs;
        a = top + std::log(sum);
      }
    }
  });
  return 0;
}
