// What the forward and backward bodies of the norms share: typed and untyped loads, rows in chunks.
#pragma once

#include "norm_plan.h"
#include "prims.h"
#include "teams.cuh"

namespace sw {

// A parameter whose type only the launch knows.
enum class Kind : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

struct Untyped {
  const void* address;
  Kind kind;
};

template <Cache kCache, int N, typename T>
SW_DEVICE void load_floats(float (&to)[N], Global<const T> from) {
  const Vector<T, N> raw = load<N, kCache>(from);
  SW_UNROLL
  for (int e = 0; e < N; ++e) to[e] = to_float(raw.data[e]);
}

template <int N>
SW_DEVICE void load_floats(float (&to)[N], const Untyped& from, int64_t index) {
  if (from.kind == Kind::kFloat32) {
    load_floats<Cache::kReuse>(to, Global<const float>{(const float*)from.address} + index);
  } else if (from.kind == Kind::kFloat16) {
    load_floats<Cache::kReuse>(to, Global<const float16>{(const float16*)from.address} + index);
  } else {
    load_floats<Cache::kReuse>(to, Global<const bfloat16>{(const bfloat16*)from.address} + index);
  }
}

template <typename T, int N>
SW_DEVICE Vector<T, N> rounded(const float (&from)[N]) {
  Vector<T, N> result;
  SW_UNROLL
  for (int e = 0; e < N; ++e) result.data[e] = from_float<T>(from[e]);
  return result;
}

// The chunks of this thread's row. Those beyond the row's width, or of no row, are zero.
template <typename T, int kWide, int kChunks>
struct RowChunks {
  Vector<T, kWide> chunk[kChunks];

  SW_DEVICE void load_from(Global<const T> row, const Team& team, int width, bool active) {
    SW_UNROLL
    for (int j = 0; j < kChunks; ++j) {
      const int column = (team.lane + j * team.lanes) * kWide;
      if (active && column < width) {
        chunk[j] = load<kWide, Cache::kStream>(row + column);
      } else {
        SW_UNROLL
        for (int e = 0; e < kWide; ++e) chunk[j].data[e] = from_float<T>(0.0f);
      }
    }
  }
};

}  // namespace sw
