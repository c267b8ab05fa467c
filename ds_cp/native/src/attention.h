// Attention over packed pages: what the driver (attention.cpp) and the inner loops
// (attention_kernels.cpp, one object per instruction set) share.
//
// A row's result is defined by positions alone, so that it does not depend on the batch, the number of
// threads or the rows beside it:
// - keys are taken in *tiles*: those whose blocks begin in the same kTile positions. A key has the
//   column (position - begin of the tile) of the tile's scores, whichever keys are there beside it;
// - tiles make *splits*, of kSplit positions. Each split is an online softmax of its own from nothing,
//   and splits are merged in ascending order, by whichever thread they were computed;
// - a matrix product adds up along a column of its factors in order, each row by itself;
// - keys that a row does not see weigh exactly 0 where they are not skipped.
//
// A few rows (decoding) wait for memory, and the processor reads ahead only along one stretch. So a task
// then serves several KV heads, whose keys (or values) lie side by side in a block, and walks blocks as
// they lie. Their rows are numbered head by head: row r of head h is h * rows + r.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace ds_cp {

constexpr int64_t kTile = 512;    // positions
constexpr int64_t kSplit = 2048;  // positions, a multiple of kTile
constexpr int kMaxRows = 96;      // rows of a row tile (query heads of one KV head, folded)
constexpr int kFewRows = 12;      // of a KV head; with so few, memory takes the time
constexpr int kMaxSegments = 1024;              // of one tile
constexpr int kMaxColumns = 2 * kTile;          // of one tile: a block may begin at its end
constexpr int64_t kMaxPosition = int64_t{1} << 40;
constexpr int64_t kNoWindow = int64_t{1} << 50;  // longer than any
constexpr int kUnit = 16;         // rows and columns: products by brgemm have whole ones
constexpr int kRound = 32;        // columns; ranges of a row's softmax begin at multiples of it

enum Type { kFloat32 = 0, kBfloat16 = 1 };

// Keys of one block (or of a part of one, where a block is longer than a tile) for one KV head.
struct Segment {
  const void* k;  // packed keys: [k_dim / p][block_size][p], at the first key
  const void* v;  // packed values: [block_size / p][v_dim][p], at the first key
  int64_t first;  // position of the first key
  int32_t keys;
  int32_t column;  // of the first key in the tile
};

// The layer, as far as the inner loops need it.
struct Shape {
  int32_t type;
  int32_t k_dim, v_dim;
  int32_t v_pad;  // v_dim rounded up to whole vectors
  int64_t k_head, v_head;  // elements from a KV head's keys (values) of a block to the next one's
  int32_t block_size;
  int32_t repack;  // blocks are no whole vectors: tiles are copied into whole ones first
  int32_t amx;     // matrix products by ATen's brgemm
  float scale;
  float softcap;   // 0: none
  int64_t window;  // kNoWindow: none
};

// Attention of some rows over some keys, not yet divided: out = acc / sum, lse = (max + log2 sum)
// ln 2. `max` in units of log2.
struct Running {
  float* acc;  // [rows][v_pad]
  float* max;
  float* sum;
};

// ATen's product of bf16 matrices, found at run time; nothing when it is not there.
using Multiply = void (*)(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc,
                          bool add, const void* a, const void* b, float* c, bool packed);
struct Brgemm {
  Multiply multiply = nullptr;
  void (*release)(bool packed) = nullptr;
};
const Brgemm& brgemm();

// One thread's room, and the rows it is at.
struct Work {
  const Shape* shape;
  int32_t rows;        // of one KV head
  int32_t heads;       // KV heads; 1 with brgemm and where blocks are repacked
  int64_t* positions;  // [heads * rows]
  Segment* segments;   // [kMaxSegments]: of the tile at hand, for the first head
  void* a;             // queries as the products want them: [heads * rows][k_dim]
  float* scores;       // [heads * rows][score_stride]; weights take their place
  int64_t score_stride;
  void* packed_k;  // room for one tile, where blocks are repacked
  void* packed_v;
  const void* ahead;  // the first head's keys of the tile after this one, or null
  Running part;  // of the split at hand
  Multiply multiply;
};

// Queries of the rows: row r of a KV head is token (first_row + r) / fold, and of that KV head's `fold`
// query heads (first_row + r) % fold. `data`: of the first KV head.
struct Queries {
  const void* data;
  int64_t token_stride, head_stride;  // elements
  int64_t first_row;
  int32_t fold;
};

// Where results go: the same rows of one KV head, of fp32 out and lse.
struct Outputs {
  float* out;
  int64_t out_token, out_head;  // elements
  float* lse;
  int64_t lse_token, lse_head;
  int64_t first_row;
  int32_t fold;
  int32_t into;  // merge with what is there
};

struct Ops {
  int lanes;  // fp32 numbers of a vector
  // Copies the rows' queries to work.a.
  void (*load_queries)(Work& work, const Queries& queries);
  // Empties work.part.
  void (*reset)(Work& work);
  // Folds the keys of one tile into work.part.
  void (*tile)(Work& work, const Segment* segments, int count);
  // Folds `part` into `into`, `rows` rows.
  void (*merge)(const Shape& shape, int rows, const Running& into, const Running& part);
  // Divides and writes `rows` rows.
  void (*finish)(const Shape& shape, int rows, const Running& running, const Outputs& outputs);
};

// The loops of a variant for a type; null when it is not there or does not run here.
const Ops* attention_ops(int isa, int type);


}  // namespace ds_cp

// The variants that the compiler could make.
extern "C" {
const ds_cp::Ops* ds_cp_attention_avx512bf16(int type);
const ds_cp::Ops* ds_cp_attention_avx512(int type);
const ds_cp::Ops* ds_cp_attention_avx2(int type);
const ds_cp::Ops* ds_cp_attention_baseline(int type);
}
