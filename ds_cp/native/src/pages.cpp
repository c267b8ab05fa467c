// Writing of tokens into packed pages, and partials: their merge, and their rows on the wire.
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
  int64_t part_type;  // of part_out, a Type; part_lse is fp32, at any address
  const char* part_out;
  int64_t part_out_token, part_out_head;  // bytes
  const char* part_lse;
  int64_t part_lse_token, part_lse_head;  // bytes
  const int64_t* rows;                    // null: row r is first + r
  int64_t first, num_rows, heads, dim, threads;
};

struct PackArgs {
  const float* out;
  int64_t out_token, out_head;
  const float* lse;
  int64_t lse_token, lse_head;
  char* packed;  // rows of heads * dim numbers of the type, then heads of fp32
  int64_t type, num_rows, heads, dim, threads;
};

enum Type : int64_t { kFloat = 0, kBfloat = 1 };

// The upper half, rounded to nearest, ties to even; a NaN stays one.
uint16_t to_bfloat(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(x != x ? (bits >> 16) | 0x40 : rounded);
}

float to_float(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float found;
  std::memcpy(&found, &bits, sizeof found);
  return found;
}
float to_float(float x) { return x; }

// Rows by tasks of several, on threads where there is much to do.
template <class F>
void for_rows(int64_t num_rows, int64_t numbers, int64_t most_threads, F each_row) {
  const int threads = num_rows * numbers < kSerial ? 1 : static_cast<int>(most_threads);
  const int64_t each = threads > 1 ? 8 : num_rows;  // rows of a task
  const int64_t tasks = each ? (num_rows + each - 1) / each : 0;
  parallel_for(tasks, threads, [&](int64_t task, int) {
    for (int64_t r = task * each; r < std::min(num_rows, (task + 1) * each); ++r) each_row(r);
  });
}

template <class E>
void merge(const MergeArgs& args) {
  for_rows(args.num_rows, args.heads * args.dim, args.threads, [&](int64_t r) {
    const int64_t row = args.rows ? args.rows[r] : args.first + r;
    for (int64_t h = 0; h < args.heads; ++h) {
      float& a = args.lse[row * args.lse_token + h * args.lse_head];
      float b;
      std::memcpy(&b, args.part_lse + r * args.part_lse_token + h * args.part_lse_head, sizeof b);
      float* out = args.out + row * args.out_token + h * args.out_head;
      const E* from = reinterpret_cast<const E*>(args.part_out + r * args.part_out_token +
                                                 h * args.part_out_head);
      if (b == -INFINITY) {
        if (a == -INFINITY) std::memset(out, 0, args.dim * sizeof(float));
        continue;
      }
      if (a == -INFINITY) {
        for (int64_t d = 0; d < args.dim; ++d) out[d] = to_float(from[d]);
        a = b;
        continue;
      }
      const float top = a > b ? a : b;
      const float x = std::exp(a - top), y = std::exp(b - top), sum = x + y;
      const float mine = x / sum, theirs = y / sum;
      for (int64_t d = 0; d < args.dim; ++d) out[d] = out[d] * mine + to_float(from[d]) * theirs;
      a = top + std::log(sum);
    }
  });
}

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
// was written), or 2 for a type that there is not.
DS_CP_EXPORT int64_t ds_cp_merge_rows(const MergeArgs* args) {
  for (int64_t r = 0; args->rows && r < args->num_rows; ++r)
    if (args->rows[r] < 0 || args->rows[r] >= args->into_tokens) return 1;
  if (!args->rows && (args->first < 0 || args->num_rows > args->into_tokens - args->first)) return 1;
  if (args->part_type == kFloat)
    merge<float>(*args);
  else if (args->part_type == kBfloat)
    merge<uint16_t>(*args);
  else
    return 2;
  return 0;
}

// Writes a partial as rows of bytes. Returns 0, or 2 for a type that there is not.
DS_CP_EXPORT int64_t ds_cp_pack_rows(const PackArgs* given) {
  const PackArgs& args = *given;
  if (args.type != kFloat && args.type != kBfloat) return 2;
  const int64_t element = args.type == kFloat ? 4 : 2;
  const int64_t out_bytes = args.heads * args.dim * element;
  for_rows(args.num_rows, args.heads * args.dim, args.threads, [&](int64_t r) {
    char* to = args.packed + r * (out_bytes + args.heads * 4);
    for (int64_t h = 0; h < args.heads; ++h) {
      const float* from = args.out + r * args.out_token + h * args.out_head;
      char* head = to + h * args.dim * element;
      if (element == 4) {
        std::memcpy(head, from, args.dim * 4);
      } else {
        uint16_t* numbers = reinterpret_cast<uint16_t*>(head);
        for (int64_t d = 0; d < args.dim; ++d) numbers[d] = to_bfloat(from[d]);
      }
      std::memcpy(to + out_bytes + h * 4, args.lse + r * args.lse_token + h * args.lse_head, 4);
    }
  });
  return 0;
}
