// Attention over packed pages: checks the call, lays keys out in tiles and splits, deals row tiles out
// to threads, merges splits in order.
#include "attention.h"

#include <algorithm>
#include <atomic>
#include <climits>
#include <memory>
#include <vector>

#include "parallel.h"
#include "scratch.h"

namespace ds_cp {

const Ops* attention_ops(int isa, int type) {
  if (isa < 0 || isa >= kIsas || !isa_runs(isa)) return nullptr;
  switch (isa) {
#ifdef DS_CP_HAS_AVX512BF16
    case kAvx512Bf16:
      return ds_cp_attention_avx512bf16(type);
#endif
#ifdef DS_CP_HAS_AVX512
    case kAvx512:
      return ds_cp_attention_avx512(type);
#endif
#ifdef DS_CP_HAS_AVX2
    case kAvx2:
      return ds_cp_attention_avx2(type);
#endif
    case kBaseline:
      return ds_cp_attention_baseline(type);
    default:
      return nullptr;
  }
}

namespace {

// What Python packs, field by field.
struct BatchArgs {
  int64_t parts, entries;  // requests; entries of `blocks`, `firsts` and `keys`
  const int64_t *q_starts, *block_starts, *blocks, *firsts, *keys;
};
struct LayerArgs {
  int64_t type, kv_heads, fold, k_dim, v_dim, block_size, window, isa, amx;
  double scale, softcap;
};
struct CallArgs {
  const void* q;
  int64_t q_token, q_head;
  const int64_t* positions;
  int64_t tokens;
  const char* pages;
  int64_t page_bytes, num_blocks;  // bytes from block to block
  float* out;
  int64_t out_token, out_head;
  float* lse;
  int64_t lse_token, lse_head;
  int64_t into, threads;
};

enum Fault { kFine = 0, kBadLayer = 1, kBadRows = 2, kBadBlocks = 3, kNoMemory = 4, kFailed = 5 };

// One block's keys, or a part of them, before a head is chosen.
struct Piece {
  int64_t block, start, first;
  int32_t keys, column;
};
struct Range {
  int64_t begin, end;
};
struct PartPlan {
  Range splits;  // of `splits`
  int64_t first_row, rows;  // folded
  int64_t cost;
};
struct Plan {
  std::vector<Piece> pieces;
  std::vector<Range> tiles;   // of pieces
  std::vector<Range> splits;  // of tiles
  std::vector<PartPlan> parts;
  int64_t columns = 0;  // most of a tile
};

// Rows of a request that each of some KV heads has. `splits`: those that they can see, up to the position
// `high`; `partial`: where their partial results begin, one a split, when splits are done apart, else
// -1.
struct RowTile {
  int32_t part;
  int32_t head, heads;
  int64_t row, rows;  // of a head
  int64_t high;
  Range splits;
  int64_t cost;
  int64_t partial;
  int64_t tasks;
};
struct Task {
  int64_t row_tile;
  int32_t head, heads;
  Range splits;
};

Fault check(const BatchArgs& batch, const LayerArgs& layer, const CallArgs& call) {
  const int64_t pair = layer.type == kBfloat16 ? 2 : 1;
  if (layer.kv_heads < 1 || layer.fold < 1 || layer.k_dim < 1 || layer.v_dim < 1 ||
      layer.block_size < 1 || layer.k_dim % pair || layer.block_size % pair ||
      layer.k_dim > 65536 || layer.v_dim > 65536 || !(layer.scale > 0) || !(layer.softcap >= 0))
    return kBadLayer;
  if (batch.parts < 0 || batch.entries < 0) return kBadRows;
  int64_t row = 0, entry = 0;
  if (batch.q_starts[0] < 0 || batch.block_starts[0] < 0) return kBadRows;
  for (int64_t i = 0; i <= batch.parts; ++i) {
    if (batch.q_starts[i] < row || batch.q_starts[i] > call.tokens) return kBadRows;
    if (batch.block_starts[i] < entry || batch.block_starts[i] > batch.entries) return kBadBlocks;
    row = batch.q_starts[i];
    entry = batch.block_starts[i];
  }
  for (int64_t i = 0; i < batch.entries; ++i)
    if (batch.blocks[i] < 0 || batch.blocks[i] >= call.num_blocks || batch.keys[i] < 0 ||
        batch.keys[i] > layer.block_size || batch.firsts[i] < 0 || batch.firsts[i] > kMaxPosition)
      return kBadBlocks;
  for (int64_t t = batch.q_starts[0]; t < batch.q_starts[batch.parts]; ++t)
    if (call.positions[t] < -1 || call.positions[t] > 2 * kMaxPosition) return kBadRows;
  return kFine;
}

// Cuts a request's keys into tiles and splits by their positions.
void lay_out(const BatchArgs& batch, const LayerArgs& layer, int64_t part, Plan& plan) {
  const int64_t pair = layer.type == kBfloat16 ? 2 : 1;
  const int64_t first_split = static_cast<int64_t>(plan.splits.size());
  int64_t tile = -1, split = -1, next = 0;
  for (int64_t i = batch.block_starts[part]; i < batch.block_starts[part + 1]; ++i) {
    for (int64_t start = 0; start < batch.keys[i]; start += kTile) {
      const int64_t first = batch.firsts[i] + start;
      const int64_t keys = std::min(kTile, batch.keys[i] - start);
      const int64_t wanted = (first % kTile + pair - 1) / pair * pair;
      int64_t column = std::max(next, wanted);
      const bool full = !plan.tiles.empty() &&
                        (column + keys > kMaxColumns ||
                         plan.tiles.back().end - plan.tiles.back().begin >= kMaxSegments);
      if (first / kSplit != split) {
        split = first / kSplit;
        const auto at = static_cast<int64_t>(plan.tiles.size());
        plan.splits.push_back({at, at});
        tile = -1;
      }
      if (first / kTile != tile || full) {
        tile = first / kTile;
        const auto at = static_cast<int64_t>(plan.pieces.size());
        plan.tiles.push_back({at, at});
        plan.splits.back().end = static_cast<int64_t>(plan.tiles.size());
        column = wanted;
      }
      plan.pieces.push_back({batch.blocks[i], start, first, static_cast<int32_t>(keys),
                             static_cast<int32_t>(column)});
      plan.tiles.back().end = static_cast<int64_t>(plan.pieces.size());
      next = column + (keys + pair - 1) / pair * pair;
      plan.columns = std::max(plan.columns, next);
    }
  }
  const int64_t rows = (batch.q_starts[part + 1] - batch.q_starts[part]) * layer.fold;
  plan.parts.push_back({{first_split, static_cast<int64_t>(plan.splits.size())},
                        batch.q_starts[part] * layer.fold, rows, 0});
}

class Attention {
 public:
  Attention(const BatchArgs& batch, const LayerArgs& layer, const CallArgs& call, const Ops& ops)
      : batch_(batch), layer_(layer), call_(call), ops_(ops) {
    shape_.type = static_cast<int32_t>(layer.type);
    shape_.k_dim = static_cast<int32_t>(layer.k_dim);
    shape_.v_dim = static_cast<int32_t>(layer.v_dim);
    shape_.v_pad = static_cast<int32_t>((layer.v_dim + ops.lanes - 1) / ops.lanes * ops.lanes);
    shape_.block_size = static_cast<int32_t>(layer.block_size);
    shape_.repack = layer.block_size % ops.lanes != 0 || layer.v_dim % ops.lanes != 0;
    shape_.amx = layer.amx && layer.type == kBfloat16 && layer.isa == kAvx512Bf16;
    shape_.k_head = layer.block_size * layer.k_dim;
    shape_.v_head = layer.block_size * layer.v_dim;
    shape_.scale = static_cast<float>(layer.scale);
    shape_.softcap = static_cast<float>(layer.softcap);
    shape_.window = layer.window > 0 ? std::min(layer.window, kNoWindow) : kNoWindow;
    element_ = layer.type == kBfloat16 ? 2 : 4;
  }

  Fault run() {
    for (int64_t i = 0; i < batch_.parts; ++i) lay_out(batch_, layer_, i, plan_);
    const int64_t total = deal_out();
    const int64_t macs = total * (layer_.k_dim + layer_.v_dim);
    const int threads = macs < kSerial ? 1 : static_cast<int>(call_.threads);
    cut(total, threads);
    left_ = std::make_unique<std::atomic<int64_t>[]>(row_tiles_.size());
    for (size_t i = 0; i < row_tiles_.size(); ++i) left_[i] = row_tiles_[i].tasks;
    parallel_for(static_cast<int64_t>(tasks_.size()), threads, [this](int64_t task, int) {
      try {  // an exception must not leave the thread it is thrown in
        this->task(tasks_[task]);
      } catch (const std::bad_alloc&) {
        fault_ = kNoMemory;
      } catch (...) {  // of torch's product
        fault_ = kFailed;
      }
    });
    return fault_;
  }

 private:
  static constexpr int64_t kSerial = 400000;  // products; below, waking threads costs more
  static constexpr int64_t kPartialBytes = 64 << 20;  // most room of splits that are done apart

  // The row tiles, the dearest first as far as requests go; returns the sum of costs.
  int64_t deal_out() {
    std::vector<int64_t> order(plan_.parts.size());
    for (size_t i = 0; i < order.size(); ++i) {
      order[i] = static_cast<int64_t>(i);
      PartPlan& part = plan_.parts[i];
      for (int64_t s = part.splits.begin; s < part.splits.end; ++s) part.cost += keys_of(s);
      part.cost *= std::min<int64_t>(part.rows, kMaxRows);
    }
    std::stable_sort(order.begin(), order.end(), [this](int64_t a, int64_t b) {
      return plan_.parts[a].cost > plan_.parts[b].cost;
    });
    int64_t total = 0;
    for (int64_t i : order) {
      const PartPlan& part = plan_.parts[i];
      const int64_t tiles = (part.rows + kMaxRows - 1) / kMaxRows;
      for (int64_t t = tiles - 1; t >= 0; --t) {
        RowTile tile;
        tile.part = static_cast<int32_t>(i);
        tile.row = part.first_row + t * kMaxRows;
        tile.rows = std::min<int64_t>(kMaxRows, part.first_row + part.rows - tile.row);
        tile.partial = -1;
        see(part, tile);
        const auto heads = static_cast<int32_t>(layer_.kv_heads);
        const int32_t together = heads_together(tile.rows);
        const int64_t cost_of_head = tile.cost;
        for (tile.head = 0; tile.head < heads; tile.head += together) {
          tile.heads = std::min(together, heads - tile.head);
          tile.cost = cost_of_head * tile.heads;
          row_tiles_.push_back(tile);
          total += tile.cost;
        }
      }
    }
    return total;
  }

  // KV heads that a task may serve, about equally many each time.
  int32_t heads_together(int64_t rows) const {
    if (rows > kFewRows || shape_.amx || shape_.repack) return 1;
    const int64_t most = kMaxRows / rows;
    const int64_t times = (layer_.kv_heads + most - 1) / most;
    return static_cast<int32_t>((layer_.kv_heads + times - 1) / times);
  }

  int64_t keys_of(int64_t split) const {
    const Range tiles = plan_.splits[split];
    const Piece& last = plan_.pieces[plan_.tiles[tiles.end - 1].end - 1];
    return last.first + last.keys - plan_.pieces[plan_.tiles[tiles.begin].begin].first;
  }

  // The splits that a row tile's rows can see, and what they cost.
  void see(const PartPlan& part, RowTile& tile) const {
    int64_t low = INT64_MAX, high = INT64_MIN, cost = 0;
    for (int64_t t = tile.row / layer_.fold; t <= (tile.row + tile.rows - 1) / layer_.fold; ++t) {
      low = std::min(low, call_.positions[t]);
      high = std::max(high, call_.positions[t]);
    }
    tile.high = high;
    tile.splits = {part.splits.end, part.splits.begin};
    for (int64_t s = part.splits.begin; s < part.splits.end; ++s) {
      const Range tiles = plan_.splits[s];
      const Piece& first = plan_.pieces[plan_.tiles[tiles.begin].begin];
      const Piece& last = plan_.pieces[plan_.tiles[tiles.end - 1].end - 1];
      if (first.first > high || last.first + last.keys - 1 + shape_.window <= low) continue;
      tile.splits.begin = std::min(tile.splits.begin, s);
      tile.splits.end = s + 1;
      cost += cost_of(tile, s);
    }
    if (tile.splits.begin >= tile.splits.end) tile.splits = {part.splits.begin, part.splits.begin};
    tile.cost = std::max<int64_t>(1, cost);
  }

  // What a split costs for one head of a row tile.
  int64_t cost_of(const RowTile& tile, int64_t split) const {
    const Range tiles = plan_.splits[split];
    const Piece& first = plan_.pieces[plan_.tiles[tiles.begin].begin];
    const Piece& last = plan_.pieces[plan_.tiles[tiles.end - 1].end - 1];
    const int64_t keys = std::min(tile.high, last.first + last.keys - 1) - first.first + 1;
    return std::max<int64_t>(tile.rows, 4) * std::max<int64_t>(keys, 0);
  }

  // Rows that products write to: brgemm's come in whole kUnit.
  int64_t padded(int64_t rows) const {
    return shape_.amx ? (rows + 2 * kUnit - 1) / kUnit * kUnit : rows;
  }

  size_t partial_bytes(int64_t rows) const {
    Pieces room(nullptr);
    running(room, rows);
    return room.used();
  }

  Running running(Pieces& room, int64_t rows) const {
    Running found;
    found.acc = room.take<float>(padded(rows) * shape_.v_pad);
    found.max = room.take<float>(rows);
    found.sum = room.take<float>(rows);
    return found;
  }

  // Tasks: whole row tiles, or their splits apart where a row tile is a large share of everything. A task
  // takes all heads of its row tile while that is no more than a thread's share of what is left, so that
  // the threads end at about the same time.
  void cut(int64_t total, int threads) {
    size_t bytes = 0;
    int64_t left = total;
    for (size_t i = 0; i < row_tiles_.size(); ++i) {
      RowTile& tile = row_tiles_[i];
      const int64_t count = tile.splits.end - tile.splits.begin;
      const size_t more = partial_bytes(tile.rows * tile.heads) * count;
      const size_t before = tasks_.size();
      if (threads == 1 || count < 2 || tile.cost <= total / (4 * threads) ||
          bytes + more > kPartialBytes) {
        cut_heads(static_cast<int64_t>(i), tile.splits, tile.cost, left / threads);
        left -= tile.cost;
      } else {
        tile.partial = static_cast<int64_t>(bytes);
        bytes += more;
        for (int64_t s = tile.splits.begin; s < tile.splits.end; ++s) {
          const int64_t cost = cost_of(tile, s) * tile.heads;
          cut_heads(static_cast<int64_t>(i), {s, s + 1}, cost, left / threads);
          left -= cost;
        }
      }
      tile.tasks = static_cast<int64_t>(tasks_.size() - before);
    }
    if (bytes) {
      static thread_local Scratch room;
      partials_ = room.need(bytes);
    }
  }

  // Tasks for some splits of a row tile: as few as cost no more than `share` each.
  void cut_heads(int64_t row_tile, Range splits, int64_t cost, int64_t share) {
    const RowTile& tile = row_tiles_[row_tile];
    const int64_t wanted = (cost + share - 1) / std::max<int64_t>(share, 1);
    const auto tasks = static_cast<int32_t>(std::max<int64_t>(1, std::min<int64_t>(wanted, tile.heads)));
    for (int32_t i = 0; i < tasks; ++i) {
      const int32_t begin = tile.heads * i / tasks, end = tile.heads * (i + 1) / tasks;
      tasks_.push_back({row_tile, tile.head + begin, end - begin, splits});
    }
  }

  // A row tile's results over one split, from the rows of `head` on.
  Running partial(const RowTile& tile, int64_t split, int32_t head) const {
    const int64_t rows = tile.rows * tile.heads;
    Pieces room(partials_ + tile.partial + partial_bytes(rows) * (split - tile.splits.begin));
    return from_row(running(room, rows), (head - tile.head) * tile.rows);
  }

  Running from_row(const Running& running, int64_t row) const {
    return {running.acc + row * shape_.v_pad, running.max + row, running.sum + row};
  }

  void task(const Task& task) {
    const RowTile& tile = row_tiles_[task.row_tile];
    static thread_local Scratch scratch;
    Pieces count(nullptr);
    Work work;
    Running whole;
    lay_out_work(count, tile, task.heads, work, whole);
    Pieces room(scratch.need(count.used()));
    lay_out_work(room, tile, task.heads, work, whole);
    for (int64_t r = 0; r < tile.rows * task.heads; ++r)
      work.positions[r] = call_.positions[(tile.row + r % tile.rows) / layer_.fold];
    Queries queries;
    queries.data = static_cast<const char*>(call_.q) +
                   task.head * layer_.fold * call_.q_head * element_;
    queries.token_stride = call_.q_token;
    queries.head_stride = call_.q_head;
    queries.first_row = tile.row;
    queries.fold = static_cast<int32_t>(layer_.fold);
    ops_.load_queries(work, queries);
    const auto rows = static_cast<int>(tile.rows * task.heads);
    const bool apart = tile.partial >= 0;
    bool first = true;
    for (int64_t s = task.splits.begin; s < task.splits.end; ++s) {
      if (apart) work.part = partial(tile, s, task.head);
      if (!apart && !first && s == task.splits.begin + 1) std::swap(work.part, whole);
      ops_.reset(work);
      split(work, task.head, s);
      if (!apart && !first) ops_.merge(shape_, rows, whole, work.part);
      first = false;
    }
    if (shape_.amx) brgemm().release(true);
    if (!apart) {
      if (first) ops_.reset(work);
      const Running& found = task.splits.end - task.splits.begin > 1 ? whole : work.part;
      finish(tile, task.head, task.heads, found);
      return;
    }
    if (left_[task.row_tile].fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    const Running all = partial(tile, tile.splits.begin, tile.head);
    for (int64_t s = tile.splits.begin + 1; s < tile.splits.end; ++s)  // the last task, in order
      ops_.merge(shape_, static_cast<int>(tile.rows * tile.heads), all, partial(tile, s, tile.head));
    finish(tile, tile.head, tile.heads, all);
  }

  void lay_out_work(Pieces& room, const RowTile& tile, int32_t heads, Work& work,
                    Running& whole) const {
    const int64_t rows = tile.rows * heads;
    work.shape = &shape_;
    work.rows = static_cast<int32_t>(tile.rows);
    work.heads = heads;
    work.positions = room.take<int64_t>(rows);
    work.segments = room.take<Segment>(kMaxSegments);
    work.a = room.take<float>(padded(rows) * shape_.k_dim);
    // Of brgemm, ATen compiles and keeps a kernel for each shape and stride in each thread.
    const int64_t columns =
        shape_.amx ? (plan_.columns <= kTile ? kTile : kMaxColumns) : plan_.columns;
    work.score_stride = (columns + kRound - 1) / kRound * kRound + kRound;
    work.scores = room.take<float>(padded(rows) * work.score_stride);
    work.packed_k = work.packed_v = nullptr;
    if (shape_.repack) {
      work.packed_k = room.take<float>((plan_.columns + 16) * shape_.k_dim);
      work.packed_v = room.take<float>((plan_.columns + 16) * shape_.v_pad);
    }
    work.multiply = shape_.amx ? brgemm().multiply : nullptr;
    work.part = running(room, rows);
    whole = running(room, rows);
  }

  // Folds a split's keys of the heads from `head` on into work.part.
  void split(Work& work, int32_t head, int64_t split) {
    Segment* segments = work.segments;
    const int64_t pair = layer_.type == kBfloat16 ? 2 : 1;
    const int64_t k_head = shape_.k_head * element_, v_head = shape_.v_head * element_;
    for (int64_t t = plan_.splits[split].begin; t < plan_.splits[split].end; ++t) {
      const Range pieces = plan_.tiles[t];
      for (int64_t i = pieces.begin; i < pieces.end; ++i) {
        const Piece& piece = plan_.pieces[i];
        const char* block = call_.pages + piece.block * call_.page_bytes;
        Segment& seg = segments[i - pieces.begin];
        seg.k = block + head * k_head + piece.start * pair * element_;
        seg.v = block + layer_.kv_heads * k_head + head * v_head +
                piece.start * layer_.v_dim * element_;
        seg.first = piece.first;
        seg.keys = piece.keys;
        seg.column = piece.column;
      }
      work.ahead = nullptr;
      if (pieces.end < static_cast<int64_t>(plan_.pieces.size())) {
        const Piece& next = plan_.pieces[pieces.end];
        work.ahead = call_.pages + next.block * call_.page_bytes + head * k_head;
      }
      ops_.tile(work, segments, static_cast<int>(pieces.end - pieces.begin));
    }
  }

  // Writes the rows of the heads from `head` on.
  void finish(const RowTile& tile, int32_t head, int32_t heads, const Running& running) const {
    Outputs to;
    to.out_token = call_.out_token;
    to.out_head = call_.out_head;
    to.lse_token = call_.lse_token;
    to.lse_head = call_.lse_head;
    to.first_row = tile.row;
    to.fold = static_cast<int32_t>(layer_.fold);
    to.into = static_cast<int32_t>(call_.into);
    for (int32_t i = 0; i < heads; ++i) {
      to.out = call_.out + (head + i) * layer_.fold * call_.out_head;
      to.lse = call_.lse + (head + i) * layer_.fold * call_.lse_head;
      ops_.finish(shape_, static_cast<int>(tile.rows), from_row(running, i * tile.rows), to);
    }
  }

  const BatchArgs& batch_;
  const LayerArgs& layer_;
  const CallArgs& call_;
  const Ops& ops_;
  Shape shape_;
  int64_t element_;
  Plan plan_;
  std::vector<RowTile> row_tiles_;
  std::vector<Task> tasks_;
  std::unique_ptr<std::atomic<int64_t>[]> left_;
  char* partials_ = nullptr;
  std::atomic<Fault> fault_{kFine};
};

}  // namespace
}  // namespace ds_cp

// Attention of a step's requests over one layer's pages. The arguments are the structures above, as
// bytes. Returns a `Fault`; nothing was written when it is not kFine, but for kNoMemory and
// kFailed.
DS_CP_EXPORT int64_t ds_cp_paged_attention(const ds_cp::BatchArgs* batch,
                                           const ds_cp::LayerArgs* layer,
                                           const ds_cp::CallArgs* call) {
  using namespace ds_cp;
  const Ops* ops = attention_ops(static_cast<int>(layer->isa), static_cast<int>(layer->type));
  if (!ops || (layer->type != kFloat32 && layer->type != kBfloat16)) return kBadLayer;
  if (const Fault fault = check(*batch, *layer, *call)) return fault;
  try {
    return Attention(*batch, *layer, *call, *ops).run();
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  } catch (...) {
    return kFailed;
  }
}
