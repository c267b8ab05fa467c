// The inner loops of attention, once per instruction set: products of a few rows with a tile of keys,
// the softmax between them, and the products with the values.
#include "attention.h"
#include "simd.h"

namespace {

using namespace ds_cp;

// How a type's products are done. A: an element of the left factor (queries, weights); B: of the
// pages; kPair: elements that lie side by side; kRows x kVecs: registers of one step.

struct Float32 {
  using A = float;
  using B = float;
  static constexpr int kPair = 1;
  static constexpr int kRows = 6;
  static constexpr int kVecs = kLanes == 16 ? 4 : 2;
  template <int M, int N, class Cols>
  DS_CP_INLINE void step(vf (&c)[M][N], const A* const (&a)[M], int64_t k, const Cols& b) {
    vf y[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) y[n] = load(b.at(n));
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const vf x = all(a[m][k]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) c[m][n] += x * y[n];
    }
  }
};

// bf16 pages without instructions for bf16: pairs are widened, the left factor is fp32.
struct Widened {
  using A = float;
  using B = uint16_t;
  static constexpr int kPair = 2;
  static constexpr int kRows = kLanes == 16 ? 5 : 4;
  static constexpr int kVecs = kLanes == 16 ? 4 : 2;
  template <int M, int N, class Cols>
  DS_CP_INLINE void step(vf (&c)[M][N], const A* const (&a)[M], int64_t k, const Cols& b) {
    vu y[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) y[n] = load_bits(b.at(n));
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const vf x = all(a[m][2 * k]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) c[m][n] += x * (vf)(y[n] << 16);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const vf x = all(a[m][2 * k + 1]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) c[m][n] += x * (vf)(y[n] & 0xffff0000u);
    }
  }
};

#if defined(__AVX512BF16__)
struct Bfloat16 {
  using A = uint16_t;
  using B = uint16_t;
  static constexpr int kPair = 2;
  static constexpr int kRows = 6;
  static constexpr int kVecs = 4;
  template <int M, int N, class Cols>
  DS_CP_INLINE void step(vf (&c)[M][N], const A* const (&a)[M], int64_t k, const Cols& b) {
    __m512bh y[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) y[n] = (__m512bh)_mm512_loadu_si512(b.at(n));
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      int32_t pair;
      memcpy(&pair, a[m] + 2 * k, 4);
      const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) c[m][n] = (vf)_mm512_dpbf16_ps((__m512)c[m][n], x, y[n]);
    }
  }
};
using Bf16 = Bfloat16;
#else
using Bf16 = Widened;
#endif

DS_CP_INLINE float widen(uint16_t x) {
  const uint32_t bits = uint32_t{x} << 16;
  float found;
  memcpy(&found, &bits, 4);
  return found;
}

DS_CP_INLINE int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }
DS_CP_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
DS_CP_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// One vector of keys of the tile: kLanes columns.
template <class T>
struct Strip {
  const typename T::B* data;  // [k_dim / p][ld][p]
  int32_t column;
  int64_t low, high;  // positions of its first and last key
};

// Keys of a tile that lie one after the other, as the second product sees them.
template <class T>
struct Run {
  const typename T::B* data;  // [pairs][v_dim or v_pad][p]
  int32_t column, end;        // columns, multiples of p apart
};

constexpr int kMaxStrips = kMaxSegments + kMaxColumns / kLanes + 8;
constexpr int kMaxRuns = kMaxSegments;

// Where the vectors of one step are: side by side, or anywhere.
template <class T, int N>
struct Dense {
  const typename T::B* data;
  DS_CP_INLINE Dense from(const Strip<T>* strips, int64_t offset) {
    return {strips[0].data + offset};
  }
  inline __attribute__((always_inline)) const typename T::B* at(int n) const {
    return data + n * kLanes * T::kPair;
  }
  inline __attribute__((always_inline)) void next(int64_t stride) { data += stride; }
};

template <class T, int N>
struct Scattered {
  const typename T::B* data[N];
  DS_CP_INLINE Scattered from(const Strip<T>* strips, int64_t offset) {
    Scattered found;
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) found.data[n] = strips[n].data + offset;
    return found;
  }
  inline __attribute__((always_inline)) const typename T::B* at(int n) const { return data[n]; }
  inline __attribute__((always_inline)) void next(int64_t stride) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) data[n] += stride;
  }
};

// Asks for N vectors' worth of what is needed next, as far ahead as `ahead` is. Few rows wait for
// memory, and the processor's own prefetch begins anew with each block. Into the second cache: more requests
// can be under way to it than to the first.
template <class T, int N>
DS_CP_INLINE void ask(const typename T::B* ahead) {
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n)
    __builtin_prefetch(reinterpret_cast<const char*>(ahead) + n * kLanes * 4, 0, 2);
}

// Scores of M rows with N strips of keys, `offset` elements behind their data (of a head), and the
// largest of each row, lane by lane. `ahead`: the keys that come after these (kAhead).
template <class T, int M, int N, class Cols, bool kAhead>
void scores_step(const typename T::A* a, int64_t lda, const Strip<T>* strips, int64_t offset,
                 int64_t ldb, int64_t steps, float* c, int64_t ldc, float* tops,
                 const typename T::B* ahead) {
  const typename T::A* rows[M];
  vf sum[M][N];
  Cols cols = Cols::from(strips, offset);
  const int64_t stride = ldb * T::kPair;
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    rows[m] = a + m * lda;
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sum[m][n] = vf{};
  }
  for (int64_t k = 0; k < steps; ++k) {
    if (kAhead) ask<T, N>(ahead + k * stride);
    T::step(sum, rows, k, cols);
    cols.next(stride);
  }
  constexpr bool dense = sizeof(Cols) == sizeof(void*) && N > 1;
  int64_t at[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) at[n] = dense ? n * kLanes : strips[n].column;
  if (dense) c += strips[0].column;
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    vf top = load(tops + m * kLanes);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      store(c + at[n], sum[m][n]);
      top = max(top, sum[m][n]);
    }
    store(tops + m * kLanes, top);
    c += ldc;
  }
}

// Adds M rows' values, P times N vectors of their dims, over the keys of some runs. `offset`: elements
// from a run's data to those dims (of a head). `ahead`: the values that come after these (kAhead).
template <class T, int M, int N, int P, bool kAhead>
void values_step(const typename T::A* weights, int64_t lda, const Run<T>* runs, int count,
                 int64_t ldb, int64_t offset, float* c, int64_t ldc, const typename T::B* ahead) {
  constexpr int p = T::kPair;
  constexpr int kSide = N * kLanes;  // dims of one of P
  vf sum[P][M][N];
#pragma GCC unroll 8
  for (int i = 0; i < P; ++i)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum[i][m][n] = load(c + m * ldc + i * kSide + n * kLanes);
  const int64_t stride = ldb * p;
  for (int r = 0; r < count; ++r) {
    const typename T::A* rows[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) rows[m] = weights + m * lda + runs[r].column;
    const typename T::B* data = runs[r].data + offset;
    const typename T::B* next = r + 1 < count ? runs[r + 1].data + offset : ahead;
    const int64_t steps = (runs[r].end - runs[r].column) / p;
    for (int64_t k = 0; k < steps; ++k) {
      if (kAhead) ask<T, P * N>(next + k * stride);
#pragma GCC unroll 8
      for (int i = 0; i < P; ++i) T::step(sum[i], rows, k, Dense<T, N>{data + i * kSide * p});
      data += stride;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < P; ++i)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) store(c + m * ldc + i * kSide + n * kLanes, sum[i][m][n]);
}

template <class T>
using ScoresStep = void (*)(const typename T::A*, int64_t, const Strip<T>*, int64_t, int64_t,
                            int64_t, float*, int64_t, float*, const typename T::B*);
template <class T>
using ValuesStep = void (*)(const typename T::A*, int64_t, const Run<T>*, int, int64_t, int64_t,
                            float*, int64_t, const typename T::B*);

template <class T, int N, class Cols, bool kAhead>
DS_CP_INLINE ScoresStep<T> scores_rows(int m) {
  switch (m) {
    case 1: return scores_step<T, 1, N, Cols, kAhead>;
    case 2: return scores_step<T, 2, N, Cols, kAhead>;
    case 3: return scores_step<T, 3, N, Cols, kAhead>;
    case 4: return scores_step<T, 4, N, Cols, kAhead>;
    case 5: return scores_step<T, 5, N, Cols, kAhead>;
    default: return scores_step<T, T::kRows, N, Cols, kAhead>;
  }
}

// The step for m rows and n strips; n becomes what it takes.
template <class T>
DS_CP_INLINE ScoresStep<T> scores_for(int m, int& n, bool dense, bool ahead) {
  constexpr int all = T::kVecs;
  if (n == all && dense)
    return ahead ? scores_rows<T, all, Dense<T, all>, true>(m)
                 : scores_rows<T, all, Dense<T, all>, false>(m);
  if (n == all) return scores_rows<T, all, Scattered<T, all>, false>(m);
  n = 1;
  return scores_rows<T, 1, Dense<T, 1>, false>(m);
}

template <class T, int N, bool kAhead>
DS_CP_INLINE ValuesStep<T> values_rows(int m) {
  switch (m) {
    case 1: return values_step<T, 1, N, 1, kAhead>;
    case 2: return values_step<T, 2, N, 1, kAhead>;
    case 3: return values_step<T, 3, N, 1, kAhead>;
    case 4: return values_step<T, 4, N, 1, kAhead>;
    case 5: return values_step<T, 5, N, 1, kAhead>;
    default: return values_step<T, T::kRows, N, 1, kAhead>;
  }
}

// Few rows take twice as many dims in a step, so that 128 dims are read as they lie: of a stretch that is
// read by halves, the processor reads ahead what is not wanted yet.
constexpr int kWideRows = kLanes == 16 ? 4 : 0;  // that fit into 32 registers, or nearly so
template <class T, bool kAhead>
DS_CP_INLINE ValuesStep<T> values_rows_wide(int m) {
  switch (m) {
    case 1: return values_step<T, 1, T::kVecs, 2, kAhead>;
    case 2: return values_step<T, 2, T::kVecs, 2, kAhead>;
    case 3: return values_step<T, 3, T::kVecs, 2, kAhead>;
    default: return values_step<T, 4, T::kVecs, 2, kAhead>;
  }
}

// The step for m rows and n vectors of dims; n becomes what it takes.
template <class T>
DS_CP_INLINE ValuesStep<T> values_for(int m, int& n, bool ahead) {
  constexpr int all = T::kVecs;
  if (n >= 2 * all && m <= kWideRows) {
    n = 2 * all;
    return ahead ? values_rows_wide<T, true>(m) : values_rows_wide<T, false>(m);
  }
  if (n >= all) {
    n = all;
    return ahead ? values_rows<T, all, true>(m) : values_rows<T, all, false>(m);
  }
  if (all > 2 && n >= 2) {
    n = 2;
    return values_rows<T, (all > 2 ? 2 : 1), false>(m);
  }
  n = 1;
  return values_rows<T, 1, false>(m);
}

// The largest scores of a row's columns [low, high), lane by lane.
DS_CP_INLINE vf top_of(const float* row, int64_t low, int64_t high) {
  vf top = all(-kInf);
  for (int64_t j = low; j < high; j += kLanes) top = max(top, load(row + j));
  return top;
}

// Whether there is NaN in a row's columns [low, high).
DS_CP_INLINE bool has_nan(const float* row, int64_t low, int64_t high) {
  bool found = false;
  for (int64_t j = low; j < high; ++j) found |= row[j] != row[j];
  return found;
}

// Softmax of one row's columns [low, high) (multiples of kRound), in place: scores become weights of
// type A at the beginning of the row. Hidden columns hold -inf. NaN makes the row's sum NaN; a maximum may
// pass it over, so that only NaN and hidden columns look like a row that sees nothing.
template <class T>
DS_CP_INLINE void soften(float* row, int64_t low, int64_t high, float factor, float top,
                         float& row_max, float& row_sum, float& rescale) {
  const float before = row_max;
  const float tile_max = top * factor;
  const float now = before > tile_max ? before : tile_max;
  auto* weights = reinterpret_cast<typename T::A*>(row);
  rescale = 1.0f;
  if (now == -kInf) {
    if (has_nan(row, low, high)) row_max = row_sum = __builtin_nanf("");
    memset(weights + low, 0, (high - low) * sizeof(typename T::A));
    return;
  }
  if (now != before) {
    rescale = before == -kInf ? 0.0f : __builtin_exp2f(before - now);
    row_max = now;
  }
  const vf scale = all(factor), shift = all(now);
  vf sum = vf{};
#if defined(__AVX512BF16__)
  if constexpr (sizeof(typename T::A) == 2) {
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    for (int64_t j = low; j < high; j += 2 * kLanes) {
      const vf x = exp2_short(load(row + j) * scale - shift);
      const vf y = exp2_short(load(row + j + kLanes) * scale - shift);
      const __m512bh both = _mm512_cvtne2ps_pbh((__m512)y, (__m512)x);
      _mm512_storeu_si512(weights + j, (__m512i)both);
      sum = (vf)_mm512_dpbf16_ps((__m512)sum, both, ones);
    }
    row_sum = row_sum * rescale + sum_of(sum);
    return;
  }
#endif
  for (int64_t j = low; j < high; j += kLanes) {
    const vf x = exp2_of(load(row + j) * scale - shift);
    store(row + j, x);
    sum += x;
  }
  row_sum = row_sum * rescale + sum_of(sum);
}

// softcap * tanh(x * scale / softcap), with tanh(y) = 1 - 2 / (e^(2y) + 1).
DS_CP_INLINE void cap(float* row, int64_t low, int64_t high, float scale, float softcap) {
  const float inner = scale / softcap * 2.0f * kLog2e;
  for (int64_t j = low; j < high; j += kLanes) {
    vf t = load(row + j) * inner;
    t = t > 60.0f ? all(60.0f) : t;
    const vf e = exp2_of(t);
    store(row + j, softcap * ((e - 1.0f) / (e + 1.0f)));
  }
}

DS_CP_INLINE void fill(float* row, int64_t low, int64_t high) {
  for (int64_t j = low; j < high; ++j) row[j] = -kInf;
}

// Copies a tile's keys and values into whole vectors: keys [strips][k_dim / p][kLanes][p], values
// [columns / p][v_pad][p] and kUnit columns more; what is no key is 0.
template <class T>
void repack(Work& work, const Segment* segments, int count, int64_t columns) {
  using B = typename T::B;
  constexpr int p = T::kPair;
  const Shape& s = *work.shape;
  const int64_t steps = s.k_dim / p;
  auto* keys = static_cast<B*>(work.packed_k);
  auto* values = static_cast<B*>(work.packed_v);
  memset(keys, 0, round_up(columns, kLanes) * s.k_dim * sizeof(B));
  memset(values, 0, (columns + kUnit) * s.v_pad * sizeof(B));
  for (int i = 0; i < count; ++i) {
    const Segment& seg = segments[i];
    const auto* k = static_cast<const B*>(seg.k);
    const auto* v = static_cast<const B*>(seg.v);
    for (int64_t key = 0; key < seg.keys;) {
      const int64_t column = seg.column + key, lane = column % kLanes;
      const int64_t n = least(kLanes - lane, seg.keys - key);
      B* to = keys + column / kLanes * steps * kLanes * p + lane * p;
      for (int64_t d = 0; d < steps; ++d)
        memcpy(to + d * kLanes * p, k + (d * s.block_size + key) * p, n * p * sizeof(B));
      key += n;
    }
    for (int64_t pair = 0; pair * p < seg.keys; ++pair)
      memcpy(values + (seg.column / p + pair) * s.v_pad * p, v + pair * s.v_dim * p,
             s.v_dim * p * sizeof(B));
  }
}

template <class T>
struct Tile {
  Strip<T> strips[kMaxStrips];
  Run<T> runs[kMaxRuns];
  int num_strips, num_runs;
  int64_t strip_ld, run_ld;
  const typename T::B* ahead;  // what will be read after this tile
  int64_t begin, end;          // columns with keys
  int64_t base;        // position of column 0, if the tile is whole
  bool whole;          // its keys' columns follow one another, as their positions do
  bool even;           // no strip holds a column that is not its own keys', but for the last one
};

template <class T>
void lay_out(Work& work, const Segment* segments, int count, Tile<T>& tile) {
  using B = typename T::B;
  constexpr int p = T::kPair;
  const Shape& s = *work.shape;
  tile.begin = segments[0].column;
  tile.end = segments[count - 1].column + segments[count - 1].keys;
  tile.base = segments[0].first - segments[0].column;
  tile.whole = true;
  tile.even = !s.repack;
  for (int i = 0; i < count; ++i) {
    const Segment& seg = segments[i];
    if (seg.first - seg.column != tile.base) tile.whole = false;
    if (seg.column % kLanes) tile.even = false;
    if (i && seg.column != segments[i - 1].column + segments[i - 1].keys) tile.whole = false;
  }
  tile.num_strips = tile.num_runs = 0;
  tile.ahead = static_cast<const B*>(work.ahead ? work.ahead : segments[0].k);
  if (s.repack) {
    repack<T>(work, segments, count, tile.end);
    auto* keys = static_cast<const B*>(work.packed_k);
    for (int64_t c = tile.begin / kLanes * kLanes; c < tile.end; c += kLanes)
      tile.strips[tile.num_strips++] = {keys + c * s.k_dim, static_cast<int32_t>(c), INT64_MIN,
                                        INT64_MAX};
    tile.strip_ld = kLanes;
    const auto begin = static_cast<int32_t>(tile.begin / p * p);
    tile.runs[tile.num_runs++] = {
        static_cast<const B*>(work.packed_v) + int64_t{begin} * s.v_pad, begin,
        static_cast<int32_t>(round_up(tile.end, p))};
    tile.run_ld = s.v_pad;
    return;
  }
  for (int i = 0; i < count; ++i) {
    const Segment& seg = segments[i];
    for (int32_t at = 0; at < seg.keys; at += kLanes)
      tile.strips[tile.num_strips++] = {
          static_cast<const B*>(seg.k) + at * p, seg.column + at, seg.first + at,
          seg.first + least(at + kLanes, seg.keys) - 1};
    tile.runs[tile.num_runs++] = {static_cast<const B*>(seg.v), seg.column,
                                  static_cast<int32_t>(seg.column + round_up(seg.keys, p))};
  }
  tile.strip_ld = s.block_size;
  tile.run_ld = s.v_dim;
}

// Rows of one head that one step of registers takes, and the columns that they can see.
struct Group {
  int32_t row, rows;
  int32_t head;
  int64_t low, high;    // positions of its rows
  int64_t begin, end;   // columns, multiples of kRound; begin == end: it sees nothing
};

void look(const Segment* segments, int count, int64_t window, Group& group) {
  int64_t begin = INT64_MAX, end = 0;
  for (int i = 0; i < count; ++i) {
    const Segment& seg = segments[i];
    const int64_t low =
        group.low - seg.first >= window ? group.low - seg.first - window + 1 : 0;
    const int64_t high = least(seg.keys, group.high - seg.first + 1);
    if (low >= high) continue;
    begin = least(begin, seg.column + low);
    end = most(end, seg.column + high);
  }
  group.begin = end ? begin / kRound * kRound : 0;
  group.end = round_up(end, kRound);
}

// -inf where a row at `position` sees no key, in the columns [low, high).
template <class T>
void mask(float* row, int64_t low, int64_t high, int64_t position, int64_t window,
          const Tile<T>& tile, const Segment* segments, int count) {
  if (tile.whole) {
    const int64_t end = least(tile.end, position - tile.base + 1);
    int64_t begin = tile.begin;
    if (position - tile.base >= window) begin = most(begin, position - tile.base - window + 1);
    if (begin >= end) {
      fill(row, low, high);
      return;
    }
    fill(row, low, least(begin, high));
    fill(row, most(low, end), high);
    return;
  }
  int64_t at = low;
  for (int i = 0; i < count; ++i) {
    const Segment& seg = segments[i];
    const int64_t begin = position - seg.first >= window ? position - seg.first - window + 1 : 0;
    const int64_t end = least(seg.keys, position - seg.first + 1);
    if (begin >= end || seg.column + end <= at) continue;
    fill(row, at, least(seg.column + begin, high));
    at = most(at, seg.column + end);
    if (at >= high) return;
  }
  fill(row, at, high);
}

// Whether every row of the group sees every column of [begin, end).
template <class T>
bool sees_all(const Group& group, int64_t window, const Tile<T>& tile) {
  return tile.whole && group.begin >= tile.begin && group.end <= tile.end &&
         group.low - tile.base >= group.end - 1 &&
         group.high - tile.base - group.begin < window;
}

constexpr int kGroups = 2;    // whose scores are held at once, in the first cache
constexpr int kChunk = 512;   // columns whose values one step adds
constexpr int kFewChunk = 64; // the same for a few rows: their second dims are then still in the first cache

// Whether the groups' products wait for memory: those of a few rows, and of a tile's first ones.
bool waits(const Work& work, const Group& first) {
  return work.rows <= kFewRows || first.row == 0;
}

// Whether the processor reads ahead by itself, and is better left alone: along the keys (or values, `head`
// elements of each head) of a block that are walked as they lie and are many. It is faster than asking,
// which holds a place in the first cache for every request, but takes some 16 KB to get going.
template <class T>
bool reads_ahead(const Work& work, int64_t head) {
  constexpr int64_t kLong = 64 << 10;  // bytes
  return work.rows <= kWideRows && work.shape->block_size <= T::kVecs * kLanes &&
         work.heads * head * static_cast<int64_t>(sizeof(typename T::B)) > kLong;
}

// Per row of the groups at hand, lane by lane: the largest score of all its columns, hidden ones too.
struct Room {
  float tops[kMaxRows][kLanes];
};

// Scores of the groups' rows: the first product.
template <class T>
void scores_of(Work& work, const Tile<T>& tile, const Group* groups, int num_groups, Room& room) {
  const Shape& s = *work.shape;
  const auto* a = static_cast<const typename T::A*>(work.a);
  const int64_t ld = work.score_stride;
  const bool ask = waits(work, groups[0]) && !reads_ahead<T>(work, s.k_head);
  const Group& last = groups[num_groups - 1];
  for (int32_t r = 0; r < last.row + last.rows - groups[0].row; ++r)
    store(room.tops[r], all(-kInf));
  for (int i = 0; i < tile.num_strips; i += T::kVecs) {
    const int n = static_cast<int>(least(T::kVecs, tile.num_strips - i));
    const Strip<T>* strips = tile.strips + i;
    const int64_t low = strips[0].low, high = strips[n - 1].high;
    bool dense = true;
    for (int j = 1; j < n; ++j)
      dense &= strips[j].data == strips[0].data + j * kLanes * T::kPair &&
               strips[j].column == strips[0].column + j * kLanes;
    const auto* behind = i + n < tile.num_strips ? strips[n].data : tile.runs[0].data;
    for (int g = 0; g < num_groups; ++g) {
      const Group& group = groups[g];
      const int64_t offset = group.head * s.k_head;
      const auto* ahead = group.head < last.head ? strips[0].data + offset + s.k_head : behind;
      if (low > group.high || high <= group.low - s.window) continue;
      int seen = n;
      while (seen > 1 && strips[seen - 1].low > group.high) --seen;
      const int64_t row = group.row - groups[0].row;
      for (int j = 0; j < seen;) {
        int take = seen - j;
        const auto step = scores_for<T>(group.rows, take, dense, ask);
        step(a + group.row * s.k_dim, s.k_dim, strips + j, offset, tile.strip_ld, s.k_dim / T::kPair,
             work.scores + row * ld, ld, room.tops[row], ahead);
        j += take;
      }
    }
  }
}

#if defined(__AVX512BF16__)
// Both products by ATen's brgemm, which uses AMX where the processor has it. The right factor of a call
// is what lies side by side in a block; all rows of the groups at hand are one call, and some that are not
// there. So there are few shapes, since ATen compiles and keeps a kernel for each, in each thread.
void scores_by_brgemm(Work& work, const Tile<Bf16>& tile, const Group* groups, int num_groups) {
  const Shape& s = *work.shape;
  const Group& last = groups[num_groups - 1];
  const auto* a = static_cast<const uint16_t*>(work.a) + int64_t{groups[0].row} * s.k_dim;
  for (int i = 0; i < tile.num_strips;) {
    const Strip<Bf16>* strips = tile.strips + i;
    int n = 1;
    while (i + n < tile.num_strips && strips[n].data == strips[0].data + n * kLanes * 2 &&
           strips[n].column == strips[0].column + n * kLanes && strips[n].low <= last.high)
      ++n;
    i += n;
    if (strips[0].low > last.high || strips[n - 1].high <= groups[0].low - s.window) continue;
    work.multiply(round_up(last.row + last.rows - groups[0].row, kUnit), n * kLanes, s.k_dim, s.k_dim,
                  tile.strip_ld, work.score_stride, false, a, strips[0].data,
                  work.scores + strips[0].column, true);
  }
}

void values_by_brgemm(Work& work, const Tile<Bf16>& tile, const Group* groups, int num_groups) {
  const Shape& s = *work.shape;
  const Group& last = groups[num_groups - 1];
  auto* weights = reinterpret_cast<uint16_t*>(work.scores);
  float* acc = work.part.acc + int64_t{groups[0].row} * s.v_pad;
  const int64_t rows = last.row + last.rows - groups[0].row, all_rows = round_up(rows, kUnit);
  for (int64_t r = rows; r < all_rows; ++r)  // rows that see nothing here, or are none
    memset(weights + r * 2 * work.score_stride + last.begin, 0, (last.end - last.begin) * 2);
  for (int r = 0; r < tile.num_runs; ++r) {
    const Run<Bf16>& run = tile.runs[r];
    const int64_t begin = most(run.column, groups[0].begin);
    int64_t end = least(run.end, last.end);
    if (begin >= end) continue;
    // Whole kUnit from the run's begin, where what lies behind is of the same block and weighs 0.
    const int64_t more = run.column + round_up(end - run.column, kUnit);
    if (more <= last.end && (r + 1 == tile.num_runs || more <= tile.runs[r + 1].column)) end = more;
    work.multiply(all_rows, s.v_pad, end - begin, 2 * work.score_stride, tile.run_ld, s.v_pad, true,
                  weights + begin, run.data + (begin - run.column) * tile.run_ld, acc, true);
  }
}
#endif

// The softmax between the products: scores become weights, and what was summed so far is rescaled.
template <class T>
void weights_of(Work& work, const Tile<T>& tile, const Group* groups, int num_groups,
                const Segment* segments, int count, const Room* room) {
  const Shape& s = *work.shape;
  const float factor = s.softcap > 0 ? kLog2e : s.scale * kLog2e;
  for (int g = 0; g < num_groups; ++g) {
    const Group& group = groups[g];
    const bool plain = sees_all<T>(group, s.window, tile);
    for (int32_t r = group.row; r < group.row + group.rows; ++r) {
      float* row = work.scores + (r - groups[0].row) * work.score_stride;
      if (s.softcap > 0) cap(row, group.begin, group.end, s.scale, s.softcap);
      if (!plain)
        mask<T>(row, group.begin, group.end, work.positions[r], s.window, tile, segments, count);
      // The shift must be the largest score that the row sees: a hidden one may be so large that all
      // others weigh 0 beside it. Steps cover just the group's columns where no strip is in part, and
      // no step begins before them.
      const bool known = room && plain && tile.even && group.begin == tile.begin && !(s.softcap > 0);
      const vf top = known ? load(room->tops[r - groups[0].row]) : top_of(row, group.begin, group.end);
      float rescale;
      soften<T>(row, group.begin, group.end, factor, max_of(top), work.part.max[r],
                work.part.sum[r], rescale);
      if (rescale != 1.0f) {
        float* acc = work.part.acc + int64_t{r} * s.v_pad;
        for (int64_t d = 0; d < s.v_pad; d += kLanes) store(acc + d, load(acc + d) * rescale);
      }
    }
  }
}

// Adds one head's values over the runs [first, end), by the weights of its groups. `ahead`: the values
// that come after them.
template <class T>
void values_of_head(Work& work, const Tile<T>& tile, const Group* groups, int num_groups,
                    const typename T::A* weights, int64_t ld, int first, int end, bool ask,
                    const typename T::B* ahead) {
  const Shape& s = *work.shape;
  const int64_t head = groups[0].head * s.v_head;
  int n;
  for (int64_t dim = 0; dim < s.v_pad; dim += n * kLanes) {
    n = static_cast<int>((s.v_pad - dim) / kLanes);
    values_for<T>(groups[0].rows, n, ask);  // the others of a head have no more rows
    const int64_t offset = head + dim * T::kPair;
    const auto* next = dim + n * kLanes < s.v_pad
                           ? tile.runs[first].data + offset + n * kLanes * T::kPair
                           : ahead;
    for (int g = 0; g < num_groups; ++g) {
      const Group& group = groups[g];
      float* acc = work.part.acc + int64_t{group.row} * s.v_pad + dim;
      const auto step = values_for<T>(group.rows, n, ask);
      const auto* mine = weights + (group.row - groups[0].row) * ld;
      if (group.begin <= tile.runs[first].column && tile.runs[end - 1].end <= group.end) {
        step(mine, ld, tile.runs + first, end - first, tile.run_ld, offset, acc, s.v_pad, next);
        continue;
      }
      for (int r = first; r < end; ++r) {
        Run<T> run = tile.runs[r];
        const auto from = static_cast<int32_t>(most(run.column, group.begin));
        run.end = static_cast<int32_t>(least(run.end, group.end));
        if (from >= run.end) continue;
        run.data += (from - run.column) * tile.run_ld;
        run.column = from;
        step(mine, ld, &run, 1, tile.run_ld, offset, acc, s.v_pad, next);
      }
    }
  }
}

// Adds the values by the groups' weights: the second product. A few columns of all heads, then the next.
template <class T>
void values_of(Work& work, const Tile<T>& tile, const Group* groups, int num_groups) {
  using A = typename T::A;
  const auto* weights = reinterpret_cast<const A*>(work.scores);
  const int64_t ld = work.score_stride * static_cast<int64_t>(sizeof(float) / sizeof(A));
  const Shape& s = *work.shape;
  const int chunk = work.rows <= kFewRows ? kFewChunk : kChunk;
  // A step that fills the registers is slow enough to be better off with asking.
  const bool full = work.rows == kWideRows && s.v_pad >= 2 * T::kVecs * kLanes;
  const bool ask = waits(work, groups[0]) && (full || !reads_ahead<T>(work, s.v_head));
  const int last_head = groups[num_groups - 1].head;
  const int per_head = num_groups / (last_head + 1);
  for (int first = 0; first < tile.num_runs;) {
    int end = first + 1;  // runs of about `chunk` columns
    while (end < tile.num_runs && tile.runs[end].end - tile.runs[first].column <= chunk) ++end;
    const auto* behind = end < tile.num_runs ? tile.runs[end].data : tile.ahead;
    for (int g = 0; g < num_groups; g += per_head) {
      const int head = groups[g].head;
      const auto* ahead =
          head < last_head ? tile.runs[first].data + (head + 1) * s.v_head : behind;
      values_of_head<T>(work, tile, groups + g, per_head,
                        weights + (groups[g].row - groups[0].row) * ld, ld, first, end, ask, ahead);
    }
    first = end;
  }
}

// Gives all groups the columns that any of them sees, and leaves none out in between: a product of all
// rows at once reads the weights of all.
void widen(Group* groups, int num_groups) {
  int64_t begin = groups[0].begin, end = groups[0].end;
  int64_t high = groups[0].high, low = groups[0].low;
  for (int g = 1; g < num_groups; ++g) {
    if (groups[g].begin == groups[g].end) continue;
    begin = least(begin, groups[g].begin);
    end = most(end, groups[g].end);
    low = least(low, groups[g].low);
    high = most(high, groups[g].high);
  }
  for (int g = 0; g < num_groups; ++g) {
    groups[g].begin = begin;
    groups[g].end = end;
  }
  groups[0].low = low;
  groups[num_groups - 1].high = high;
}

template <class T>
void tile_of(Work& work, const Segment* segments, int count) {
  const Shape& s = *work.shape;
  Group groups[kMaxRows];
  int num_groups = 0, seen = 0;
  for (int32_t row = 0; row < work.rows; row += T::kRows) {
    Group g;
    g.row = row;
    g.head = 0;
    g.rows = static_cast<int32_t>(least(T::kRows, work.rows - row));
    g.low = g.high = work.positions[row];
    for (int32_t r = row + 1; r < row + g.rows; ++r) {
      g.low = least(g.low, work.positions[r]);
      g.high = most(g.high, work.positions[r]);
    }
    look(segments, count, s.window, g);
    if (g.begin == g.end && !(s.amx && num_groups)) continue;
    if (g.begin != g.end) seen = num_groups + 1;
    groups[num_groups++] = g;
  }
  num_groups = seen;  // by brgemm, groups that see nothing may lie between others
  if (!num_groups) return;
  const int per_head = num_groups;  // the same of all heads
  for (int32_t head = 1; head < work.heads; ++head) {
    for (int g = 0; g < per_head; ++g) {
      Group& group = groups[num_groups++];
      group = groups[g];
      group.row += head * work.rows;
      group.head = head;
    }
  }
  static thread_local Tile<T> room;
  Tile<T>& tile = room;
  lay_out<T>(work, segments, count, tile);

  Room tops;
#if defined(__AVX512BF16__)
  if constexpr (sizeof(typename T::A) == 2) {
    if (s.amx) {
      widen(groups, num_groups);
      scores_by_brgemm(work, tile, groups, num_groups);
      weights_of<T>(work, tile, groups, num_groups, segments, count, nullptr);
      values_by_brgemm(work, tile, groups, num_groups);
      return;
    }
  }
#endif
  // A few groups at a time, so that their scores and weights stay in the first caches; but the rows of
  // several heads are few.
  const int step = work.heads > 1 ? num_groups : kGroups;
  for (int g = 0; g < num_groups; g += step) {
    const int n = static_cast<int>(least(step, num_groups - g));
    scores_of<T>(work, tile, groups + g, n, tops);
    weights_of<T>(work, tile, groups + g, n, segments, count, &tops);
    values_of<T>(work, tile, groups + g, n);
  }
}

template <class T>
void load_queries(Work& work, const Queries& queries) {
  using A = typename T::A;
  const Shape& s = *work.shape;
  auto* to = static_cast<A*>(work.a);
  for (int32_t kv_head = 0; kv_head < work.heads; ++kv_head) {
    const int64_t first_head = int64_t{kv_head} * queries.fold;
    int64_t token = queries.first_row / queries.fold, head = queries.first_row % queries.fold;
    for (int32_t r = 0; r < work.rows; ++r, to += s.k_dim) {
      const int64_t at =
          token * queries.token_stride + (first_head + head) * queries.head_stride;
      if (s.type == kFloat32) {
        memcpy(to, static_cast<const float*>(queries.data) + at, s.k_dim * sizeof(float));
      } else {
        const uint16_t* from = static_cast<const uint16_t*>(queries.data) + at;
        if constexpr (sizeof(A) == 2)
          memcpy(to, from, s.k_dim * 2);
        else
          for (int32_t d = 0; d < s.k_dim; ++d) to[d] = static_cast<A>(widen(from[d]));
      }
      if (++head == queries.fold) head = 0, ++token;
    }
  }
}

void reset(Work& work) {
  const Shape& s = *work.shape;
  const int64_t rows = int64_t{work.heads} * work.rows;
  memset(work.part.acc, 0, rows * s.v_pad * sizeof(float));
  for (int64_t r = 0; r < rows; ++r) work.part.max[r] = -kInf, work.part.sum[r] = 0.0f;
}

void merge(const Shape& s, int rows, const Running& into, const Running& part) {
  for (int r = 0; r < rows; ++r) {
    if (part.max[r] == -kInf) continue;
    float* a = into.acc + int64_t{r} * s.v_pad;
    const float* b = part.acc + int64_t{r} * s.v_pad;
    if (into.max[r] == -kInf) {
      memcpy(a, b, s.v_pad * sizeof(float));
      into.max[r] = part.max[r];
      into.sum[r] = part.sum[r];
      continue;
    }
    const float top = into.max[r] > part.max[r] ? into.max[r] : part.max[r];
    const float x = __builtin_exp2f(into.max[r] - top), y = __builtin_exp2f(part.max[r] - top);
    for (int64_t d = 0; d < s.v_pad; d += kLanes) store(a + d, load(a + d) * x + load(b + d) * y);
    into.sum[r] = into.sum[r] * x + part.sum[r] * y;
    into.max[r] = top;
  }
}

// out = out * x + from * y over n numbers.
DS_CP_INLINE void blend(float* out, float x, const float* from, float y, int64_t n) {
  int64_t d = 0;
  if (x == 0.0f) {  // what is there may be anything
    for (; d + kLanes <= n; d += kLanes) store(out + d, load(from + d) * y);
    for (; d < n; ++d) out[d] = from[d] * y;
    return;
  }
  for (; d + kLanes <= n; d += kLanes) store(out + d, load(out + d) * x + load(from + d) * y);
  for (; d < n; ++d) out[d] = out[d] * x + from[d] * y;
}

void finish(const Shape& s, int rows, const Running& running, const Outputs& to) {
  int64_t token = to.first_row / to.fold, head = to.first_row % to.fold;
  for (int r = 0; r < rows; ++r) {
    float* out = to.out + token * to.out_token + head * to.out_head;
    float* lse = to.lse + token * to.lse_token + head * to.lse_head;
    if (++head == to.fold) head = 0, ++token;
    const bool empty = running.max[r] == -kInf;
    if (empty) {
      if (!to.into) {
        memset(out, 0, s.v_dim * sizeof(float));
        *lse = -kInf;
      }
      continue;
    }
    const float* acc = running.acc + int64_t{r} * s.v_pad;
    const float mine = running.max[r] * kLn2 + __builtin_logf(running.sum[r]);
    if (!to.into || *lse == -kInf) {
      blend(out, 0.0f, acc, 1.0f / running.sum[r], s.v_dim);
      *lse = mine;
      continue;
    }
    const float theirs = *lse, top = mine > theirs ? mine : theirs;
    const float x = __builtin_expf(theirs - top), y = __builtin_expf(mine - top), sum = x + y;
    blend(out, x / sum, acc, y / sum / running.sum[r], s.v_dim);
    *lse = top + __builtin_logf(sum);
  }
}

const Ops float32_ops = {kLanes, load_queries<Float32>, reset, tile_of<Float32>, merge, finish};
const Ops bfloat16_ops = {kLanes, load_queries<Bf16>, reset, tile_of<Bf16>, merge, finish};

}  // namespace

extern "C" const ds_cp::Ops* DS_CP_NAME(ds_cp_attention)(int type) {
  return type == kFloat32 ? &float32_ops : &bfloat16_ops;
}
