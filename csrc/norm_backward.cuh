// The backward bodies of rms_norm and layer_norm. N rows of D columns (`width`).
//
//   n = (s - mean) · rstd;  g = dy · (weight_offset + weight);  means over D
//   ds = rstd · (g - n · mean(g · n) - [centered] mean(g)) + dsummed
//   dweight = Σ_rows dy · n;  dbias = Σ_rows dy
//
// All arithmetic is float32. One pass over dy and s: every block walks over rows and leaves one row
// of partial sums; ColumnSum adds those. The same bits every time, no atomics.
#pragma once

#include "norm_types.cuh"

namespace sw {

template <typename T>
struct NormBackwardParams {
  Global<const T> dy, dsummed, s;  // (N, D) with row strides in elements; dsummed or none
  Untyped weight;                  // (D)
  Global<const float> stats;       // (1 or 2, N): rstd, then mean
  Global<T> ds;                    // (N, D)
  Global<float> partial;           // (blocks, D or 2 D): dweight, then dbias; or none
  int64_t dy_stride, dsummed_stride, s_stride, rows;
  int width, lanes;
  float weight_offset;
  bool bias_grad;

  // Where this block's partial sums of dweight (sum 0) or dbias (sum 1) stand.
  SW_DEVICE Global<float> partial_row(int sum) const {
    const int64_t columns = bias_grad ? 2 * int64_t(width) : width;
    return partial + (block_index().x * columns + int64_t(sum) * width);
  }
};

// Rows in registers, kChunks chunks of kWide elements per thread, and beside them the sums of the
// same columns. kAhead loads the next row while this one is computed. Several teams per block.
template <typename T, int kWide, int kChunks, bool kCentered, bool kAhead>
struct NormBackward {
  static constexpr const char* kName = "norm_backward";
  static constexpr int kMaxThreads = kBackwardThreads, kMinBlocks = 1;
  static constexpr int kSums = kCentered ? 2 : 1;   // over a row; and over the rows, per column
  static constexpr int kPiece = kWide < 4 ? 1 : 4;  // floats of one access to the sums
  static constexpr int kPieces = kWide / kPiece;
  // Whether dsummed is loaded while the team adds up: with eight elements per chunk it would spill.
  static constexpr bool kEarly = kAhead && kWide < 8;

  // The sums in the order [sum][chunk][piece of a chunk][lane]: neighbouring lanes use neighbouring
  // banks. The launch asks for the part that its lanes use.
  struct Shared {
    TeamExchange<2> exchange;
    SharedArray<float, kSums * kChunks * kWide * kMaxThreads> sums;
  };

  using Params = NormBackwardParams<T>;
  using Weights = float[kChunks][kWide];
  using RowSums = float[kSums][kChunks][kWide];  // of dy · n, and of dy

  struct Row {
    RowChunks<T, kWide, kChunks> dy, s;
    float rstd, mean;

    SW_DEVICE void load_from(const Params& p, const Team& team, int64_t row) {
      const bool active = row < p.rows;
      dy.load_from(p.dy + row * p.dy_stride, team, p.width, active);
      s.load_from(p.s + row * p.s_stride, team, p.width, active);
      rstd = active ? load_one(p.stats + row) : 0.0f;
      mean = kCentered && active ? load_one(p.stats + (p.rows + row)) : 0.0f;
    }
  };

  SW_DEVICE static void run(const Params& p) {
    Shared& shared = shared_memory<Shared>();
    const Team team = Team::of_this_thread(p.lanes);
    RowSums sums = {};
    Weights weights;
    load_weights(p, team, weights);

    const int64_t step = int64_t(block_count().x) * team.count;
    const int64_t first = int64_t(block_index().x) * team.count;
    Row next;
    if constexpr (kAhead) next.load_from(p, team, first + team.index);
    int turn = 0;
    for (int64_t base = first; base < p.rows; base += step, turn ^= 1) {
      if constexpr (!kAhead) next.load_from(p, team, base + team.index);
      const Row row = next;
      if constexpr (kAhead) next.load_from(p, team, base + step + team.index);
      one_row(p, team, shared, base + team.index, row, weights, sums, turn);
    }
    if (p.partial) combine(p, team, shared, sums);
  }

  SW_DEVICE static void load_weights(const Params& p, const Team& team, Weights& weights) {
    SW_UNROLL
    for (int j = 0; j < kChunks; ++j) {
      const int column = (team.lane + j * team.lanes) * kWide;
      if (column < p.width) {
        load_floats(weights[j], p.weight, column);
      } else {
        SW_UNROLL
        for (int e = 0; e < kWide; ++e) weights[j][e] = 0.0f;
      }
      SW_UNROLL
      for (int e = 0; e < kWide; ++e) weights[j][e] += p.weight_offset;
    }
  }

  SW_DEVICE static void one_row(const Params& p, const Team& team, Shared& shared, int64_t index,
                                const Row& row, const Weights& weights, RowSums& sums, int turn) {
    float mean_g[kSums] = {};  // of g · n, and of g
    float n[kChunks][kWide], g[kChunks][kWide];
    SW_UNROLL
    for (int j = 0; j < kChunks; ++j)
      SW_UNROLL
      for (int e = 0; e < kWide; ++e) {
        // Beyond the row dy is 0, so everything summed is.
        const float dy = to_float(row.dy.chunk[j].data[e]);
        n[j][e] = (to_float(row.s.chunk[j].data[e]) - row.mean) * row.rstd;
        g[j][e] = dy * weights[j][e];
        mean_g[0] += g[j][e] * n[j][e];
        sums[0][j][e] += dy * n[j][e];
        if constexpr (kCentered) mean_g[1] += g[j][e];
        if constexpr (kCentered) sums[1][j][e] += dy;
      }
    RowChunks<T, kWide, kEarly ? kChunks : 1> early;
    if constexpr (kEarly) {
      if (p.dsummed)
        early.load_from(p.dsummed + index * p.dsummed_stride, team, p.width, index < p.rows);
    }
    team_sum<true>(mean_g, team, shared.exchange, turn);
    if (index >= p.rows) return;
    SW_UNROLL
    for (int i = 0; i < kSums; ++i) mean_g[i] /= p.width;
    SW_UNROLL
    for (int j = 0; j < kChunks; ++j) {
      const int column = (team.lane + j * team.lanes) * kWide;
      if (column >= p.width) break;
      float ds[kWide], dsummed[kWide] = {};
      if (p.dsummed) {
        if constexpr (kEarly) {
          SW_UNROLL
          for (int e = 0; e < kWide; ++e) dsummed[e] = to_float(early.chunk[j].data[e]);
        } else {
          load_floats<Cache::kStream>(dsummed, p.dsummed + (index * p.dsummed_stride + column));
        }
      }
      SW_UNROLL
      for (int e = 0; e < kWide; ++e) {
        ds[e] = g[j][e] - n[j][e] * mean_g[0];
        if constexpr (kCentered) ds[e] -= mean_g[1];
        ds[e] = ds[e] * row.rstd + dsummed[e];
      }
      store(p.ds + (index * p.width + column), rounded<T>(ds));
    }
  }

  // Adds up the sums of the block's teams in a fixed order: within each warp, then warp by warp, or
  // team by team where a team is more than a warp.
  SW_DEVICE static void combine(const Params& p, const Team& team, Shared& shared, RowSums& sums) {
    for (int mask = team.lanes; mask < kWarp; mask *= 2)
      SW_UNROLL
      for (int i = 0; i < kSums; ++i)
        SW_UNROLL
        for (int j = 0; j < kChunks; ++j)
          SW_UNROLL
          for (int e = 0; e < kWide; ++e) sums[i][j][e] += shuffle_xor(sums[i][j][e], mask);

    const int unit = team.lanes < kWarp ? kWarp : team.lanes;
    const int units = thread_count() / unit, mine = thread_index() / unit;
    const bool speaks = thread_index() % unit < team.lanes;
    for (int u = 0; u < units; ++u) {
      if (u > 0) block_barrier();
      if (u == mine && speaks) pass_on(p, team, shared, sums, u > 0, u + 1 == units);
    }
  }

  SW_DEVICE static void pass_on(const Params& p, const Team& team, Shared& shared,
                                const RowSums& sums, bool add, bool last) {
    SW_UNROLL
    for (int i = 0; i < kSums; ++i)
      SW_UNROLL
      for (int j = 0; j < kChunks; ++j)
        SW_UNROLL
        for (int piece = 0; piece < kPieces; ++piece) {
          const int at = (((i * kChunks + j) * kPieces + piece) * team.lanes + team.lane) * kPiece;
          Vector<float, kPiece> value{};
          if (add) value = load_shared<kPiece>(shared.sums, at);
          SW_UNROLL
          for (int e = 0; e < kPiece; ++e) value.data[e] += sums[i][j][piece * kPiece + e];
          if (!last) {
            store_shared(shared.sums, at, value);
            continue;
          }
          const int column = (team.lane + j * team.lanes) * kWide + piece * kPiece;
          if (column < p.width && (i == 0 || p.bias_grad))
            store(p.partial_row(i) + column, value);
        }
  }
};

// Rows that registers cannot hold: each is read twice, the second time from the caches, and the
// sums over rows grow in the block's own row of partial sums. One team per block.
template <typename T, int kWide, bool kCentered>
struct NormBackwardAny {
  static constexpr const char* kName = "norm_backward_any";
  static constexpr int kMaxThreads = kAnyThreads, kMinBlocks = 1;
  static constexpr int kSums = kCentered ? 2 : 1;

  struct Shared {
    TeamExchange<2> exchange;
  };

  using Params = NormBackwardParams<T>;

  // What every pass starts from in one chunk of a row.
  struct Chunk {
    float dy[kWide], n[kWide], g[kWide];

    SW_DEVICE void load_from(const Params& p, int64_t row, int column, float mean, float rstd) {
      float weight[kWide];
      load_floats<Cache::kDefault>(dy, p.dy + (row * p.dy_stride + column));
      load_floats<Cache::kDefault>(n, p.s + (row * p.s_stride + column));
      load_floats(weight, p.weight, column);
      SW_UNROLL
      for (int e = 0; e < kWide; ++e) {
        n[e] = (n[e] - mean) * rstd;
        g[e] = dy[e] * (weight[e] + p.weight_offset);
      }
    }
  };

  SW_DEVICE static void run(const Params& p) {
    Shared& shared = shared_memory<Shared>();
    const Team team = Team::of_this_thread(p.lanes);
    int turn = 0;
    for (int64_t row = block_index().x; row < p.rows; row += block_count().x, turn ^= 1) {
      const float rstd = load_one(p.stats + row);
      const float mean = kCentered ? load_one(p.stats + (p.rows + row)) : 0.0f;
      float mean_g[kSums] = {};
      for (int column = team.lane * kWide; column < p.width; column += team.lanes * kWide) {
        Chunk chunk;
        chunk.load_from(p, row, column, mean, rstd);
        SW_UNROLL
        for (int e = 0; e < kWide; ++e) {
          mean_g[0] += chunk.g[e] * chunk.n[e];
          if constexpr (kCentered) mean_g[1] += chunk.g[e];
        }
      }
      team_sum<false>(mean_g, team, shared.exchange, turn);
      SW_UNROLL
      for (int i = 0; i < kSums; ++i) mean_g[i] /= p.width;
      for (int column = team.lane * kWide; column < p.width; column += team.lanes * kWide) {
        Chunk chunk;
        chunk.load_from(p, row, column, mean, rstd);
        write(p, row, column, rstd, mean_g, chunk);
        if (p.partial) add_to_partial(p, column, row == block_index().x, chunk);
      }
    }
  }

  SW_DEVICE static void write(const Params& p, int64_t row, int column, float rstd,
                              const float (&mean_g)[kSums], const Chunk& chunk) {
    float ds[kWide], dsummed[kWide] = {};
    if (p.dsummed)
      load_floats<Cache::kStream>(dsummed, p.dsummed + (row * p.dsummed_stride + column));
    SW_UNROLL
    for (int e = 0; e < kWide; ++e) {
      ds[e] = chunk.g[e] - chunk.n[e] * mean_g[0];
      if constexpr (kCentered) ds[e] -= mean_g[1];
      ds[e] = ds[e] * rstd + dsummed[e];
    }
    store(p.ds + (row * p.width + column), rounded<T>(ds));
  }

  // Every thread has its own columns, in every row of the block.
  SW_DEVICE static void add_to_partial(const Params& p, int column, bool first,
                                       const Chunk& chunk) {
    SW_UNROLL
    for (int i = 0; i < kSums; ++i) {
      if (i == 1 && !p.bias_grad) break;
      const Global<float> at = p.partial_row(i) + column;
      Vector<float, kWide> sum{};
      if (!first) sum = load<kWide>(Global<const float>{at.address});
      SW_UNROLL
      for (int e = 0; e < kWide; ++e)
        sum.data[e] += i == 0 ? chunk.dy[e] * chunk.n[e] : chunk.dy[e];
      store(at, sum);
    }
  }
};

// dweight[c] = Σ_p partial[p, c], dbias[c] = Σ_p partial[p, D + c], each in a fixed order: thread r
// of a column adds rows r, r + kRows, ..., then the first adds those sums.
struct ColumnSum {
  static constexpr const char* kName = "column_sum";
  static constexpr int kColumns = 32, kRows = 16;  // a column block of 128 bytes, one memory line
  static constexpr int kMaxThreads = kColumns * kRows, kMinBlocks = 1;

  struct Shared {
    SharedArray<float, kMaxThreads> sums;
  };

  struct Params {
    Global<const float> partial;  // (P, columns)
    void* dweight;                // (D)
    void* dbias;                  // (D) or none
    Kind weight_kind, bias_kind;
    int partials, columns, width;
  };

  SW_DEVICE static void run(const Params& p) {
    Shared& shared = shared_memory<Shared>();
    const int lane = thread_index() % kColumns, r = thread_index() / kColumns;
    const int column = int(block_index().x) * kColumns + lane;
    float total = 0.0f;
    if (column < p.columns) {
      for (int i = r; i < p.partials; i += kRows)
        total += load_one(p.partial + (int64_t(i) * p.columns + column));
    }
    store_shared_one(shared.sums, thread_index(), total);
    block_barrier();
    if (r > 0 || column >= p.columns) return;
    for (int i = 1; i < kRows; ++i) total += load_shared_one(shared.sums, i * kColumns + lane);
    if (column < p.width) {
      write(p.dweight, p.weight_kind, column, total);
    } else {
      write(p.dbias, p.bias_kind, column - p.width, total);
    }
  }

  SW_DEVICE static void write(void* to, Kind kind, int index, float value) {
    if (kind == Kind::kFloat32) {
      store_one(Global<float>{(float*)to} + index, value);
    } else if (kind == Kind::kFloat16) {
      store_one(Global<float16>{(float16*)to} + index, from_float<float16>(value));
    } else {
      store_one(Global<bfloat16>{(bfloat16*)to} + index, from_float<bfloat16>(value));
    }
  }
};

}  // namespace sw
