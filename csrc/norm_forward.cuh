// The forward body of rms_norm and layer_norm. N rows of D columns (`width`).
//
//   s = x + residual (x itself without one), as stored;  mean = mean(s) if centered, else 0
//   rstd = rsqrt(mean((s - mean)²) + eps)
//   y = (s - mean) · rstd · (weight_offset + weight) + bias
//
// All arithmetic is float32. A team of threads holds a row in registers, kChunks chunks of kWide
// elements each. kWide > 1: rows, weight and bias start at multiples of 16 bytes, and the width is
// a multiple of kWide.
#pragma once

#include "norm_types.cuh"

namespace sw {

// T of the rows, W of weight and bias.
template <typename T, typename W>
struct NormForwardParams {
  Global<const T> x, residual;  // (N, D) with row strides in elements; residual or none
  Global<const W> weight, bias;  // (D); bias or none
  Global<T> y, summed;           // (N, D)
  Global<float> stats;           // (1 or 2, N): rstd, then mean
  int64_t x_stride, residual_stride, rows;
  int width, lanes;
  float eps, weight_offset;
};

// One row per team; several teams in a block are parts of warps, or one warp each.
template <typename T, typename W, int kWide, int kChunks, bool kCentered>
struct NormForward {
  static constexpr const char* kName = "norm_forward";
  static constexpr int kMaxThreads = kHeldWidth / (kWide * kForwardMany), kMinBlocks = 1;

  struct Shared {
    TeamExchange<1> exchange;
  };

  using Params = NormForwardParams<T, W>;
  using Held = float[kChunks][kWide];

  SW_DEVICE static void run(const Params& p) {
    Shared& shared = shared_memory<Shared>();
    const Team team = Team::of_this_thread(p.lanes);
    const int64_t row = int64_t(block_index().x) * team.count + team.index;
    const bool active = row < p.rows;
    Held s;
    load_sum(p, team, row, active, s);

    float mean[1] = {0.0f}, square[1] = {0.0f};
    if constexpr (kCentered) {
      SW_UNROLL
      for (int j = 0; j < kChunks; ++j)
        SW_UNROLL
        for (int e = 0; e < kWide; ++e) mean[0] += s[j][e];
      team_sum<false>(mean, team, shared.exchange, 0);
      mean[0] /= p.width;
    }
    SW_UNROLL
    for (int j = 0; j < kChunks; ++j) {
      const bool inside = (team.lane + j * team.lanes) * kWide < p.width;
      SW_UNROLL
      for (int e = 0; e < kWide; ++e) {
        s[j][e] = inside ? s[j][e] - mean[0] : 0.0f;
        square[0] += s[j][e] * s[j][e];
      }
    }
    team_sum<false>(square, team, shared.exchange, 1);
    const float rstd = reciprocal_sqrt(square[0] / p.width + p.eps);
    if (!active) return;
    if (team.lane == 0) {
      store_one(p.stats + row, rstd);
      if constexpr (kCentered) store_one(p.stats + (p.rows + row), mean[0]);
    }
    write(p, team, row, rstd, s);
  }

  // s = x + residual, rounded as it is stored.
  SW_DEVICE static void load_sum(const Params& p, const Team& team, int64_t row, bool active,
                                 Held& s) {
    RowChunks<T, kWide, kChunks> x, residual;
    x.load_from(p.x + row * p.x_stride, team, p.width, active);
    if (p.residual)
      residual.load_from(p.residual + row * p.residual_stride, team, p.width, active);
    SW_UNROLL
    for (int j = 0; j < kChunks; ++j) {
      const int column = (team.lane + j * team.lanes) * kWide;
      SW_UNROLL
      for (int e = 0; e < kWide; ++e) s[j][e] = to_float(x.chunk[j].data[e]);
      if (!p.residual) continue;
      SW_UNROLL
      for (int e = 0; e < kWide; ++e) s[j][e] += to_float(residual.chunk[j].data[e]);
      const Vector<T, kWide> stored = rounded<T>(s[j]);
      SW_UNROLL
      for (int e = 0; e < kWide; ++e) s[j][e] = to_float(stored.data[e]);
      if (active && column < p.width) store(p.summed + (row * p.width + column), stored);
    }
  }

  // y of the centred s.
  SW_DEVICE static void write(const Params& p, const Team& team, int64_t row, float rstd, Held& s) {
    SW_UNROLL
    for (int j = 0; j < kChunks; ++j) {
      const int column = (team.lane + j * team.lanes) * kWide;
      if (column >= p.width) break;
      float weight[kWide], bias[kWide] = {};
      load_floats<Cache::kReuse>(weight, p.weight + column);
      if (p.bias) load_floats<Cache::kReuse>(bias, p.bias + column);
      SW_UNROLL
      for (int e = 0; e < kWide; ++e)
        s[j][e] = s[j][e] * rstd * (weight[e] + p.weight_offset) + bias[e];
      store(p.y + (row * p.width + column), rounded<T>(s[j]));
    }
  }
};

// Rows of any width, address and stride: element by element, read again in every pass.
template <typename T, typename W, bool kCentered>
struct NormForwardAny {
  static constexpr const char* kName = "norm_forward_any";
  static constexpr int kMaxThreads = kAnyThreads, kMinBlocks = 1;

  struct Shared {
    TeamExchange<1> exchange;
  };

  using Params = NormForwardParams<T, W>;

  SW_DEVICE static void run(const Params& p) {
    Shared& shared = shared_memory<Shared>();
    const Team team = Team::of_this_thread(p.lanes);
    const int64_t row = int64_t(block_index().x) * team.count + team.index;
    const bool active = row < p.rows;
    const int width = active ? p.width : 0;
    if (p.residual) add_residual(p, team, row, width);
    const Global<const T> s =
        p.residual ? Global<const T>{p.summed.address} + row * p.width : p.x + row * p.x_stride;

    float mean[1] = {0.0f}, square[1] = {0.0f};
    if constexpr (kCentered) {
      for (int column = team.lane; column < width; column += team.lanes)
        mean[0] += to_float(load_one(s + column));
      team_sum<false>(mean, team, shared.exchange, 0);
      mean[0] /= p.width;
    }
    for (int column = team.lane; column < width; column += team.lanes) {
      const float centred = to_float(load_one(s + column)) - mean[0];
      square[0] += centred * centred;
    }
    team_sum<false>(square, team, shared.exchange, 1);
    const float rstd = reciprocal_sqrt(square[0] / p.width + p.eps);
    if (active && team.lane == 0) {
      store_one(p.stats + row, rstd);
      if constexpr (kCentered) store_one(p.stats + (p.rows + row), mean[0]);
    }
    for (int column = team.lane; column < width; column += team.lanes) {
      const float weight = to_float(load_one<Cache::kReuse>(p.weight + column)) + p.weight_offset;
      const float bias = p.bias ? to_float(load_one<Cache::kReuse>(p.bias + column)) : 0.0f;
      const float y = (to_float(load_one(s + column)) - mean[0]) * rstd * weight + bias;
      store_one(p.y + (row * p.width + column), from_float<T>(y));
    }
  }

  SW_DEVICE static void add_residual(const Params& p, const Team& team, int64_t row, int width) {
    for (int column = team.lane; column < width; column += team.lanes) {
      const float x = to_float(load_one(p.x + (row * p.x_stride + column)));
      const float residual = to_float(load_one(p.residual + (row * p.residual_stride + column)));
      store_one(p.summed + (row * p.width + column), from_float<T>(x + residual));
    }
  }
};

}  // namespace sw
