// Mistakes with shared memory and the barriers around it. kBroken makes the mistake.
#pragma once

#include "prims.h"

namespace sw::broken {

struct Params {
  Global<const float> x;  // (n)
  Global<float> y;        // (n), zero
  int n;
};

constexpr int kThreads = 64;

template <bool kBroken>
struct Base {
  static constexpr int kMaxThreads = kThreads, kMinBlocks = 1;
  static constexpr int kBlocks = 1;
  using Params = broken::Params;
  struct Shared {
    SharedArray<float, kThreads> tile;
  };
  static constexpr int kSharedBytes = sizeof(Shared);
};

// y[t] = x[t / 2], through shared memory. Broken: no barrier between the write and the read.
template <bool kBroken>
struct MissingBarrier : Base<kBroken> {
  static constexpr const char* kName = "missing_barrier";
  SW_DEVICE static void run(const Params& p) {
    auto& shared = shared_memory<typename Base<kBroken>::Shared>();
    const int t = thread_index();
    store_shared_one(shared.tile, t, load_one(p.x + t));
    if constexpr (!kBroken) block_barrier();
    store_one(p.y + t, load_shared_one(shared.tile, t / 2));
  }
};

// y[t] = x[n - 1 - t], twice through one tile. Broken: no barrier before the tile is written again.
template <bool kBroken>
struct TileReused : Base<kBroken> {
  static constexpr const char* kName = "tile_reused";
  SW_DEVICE static void run(const Params& p) {
    auto& shared = shared_memory<typename Base<kBroken>::Shared>();
    const int t = thread_index();
    for (int turn = 0; turn < 2; ++turn) {
      store_shared_one(shared.tile, t, load_one(p.x + t));
      block_barrier();
      store_one(p.y + t, load_shared_one(shared.tile, kThreads - 1 - t));
      if (!kBroken && turn == 0) block_barrier();
    }
  }
};

// y[t] = x[t ^ 1] within warps. Broken: a shuffle stands where a warp barrier must.
template <bool kBroken>
struct ShuffleIsNoBarrier : Base<kBroken> {
  static constexpr const char* kName = "shuffle_is_no_barrier";
  SW_DEVICE static void run(const Params& p) {
    auto& shared = shared_memory<typename Base<kBroken>::Shared>();
    const int t = thread_index();
    store_shared_one(shared.tile, t, load_one(p.x + t));
    if constexpr (kBroken) {
      shuffle_xor(t, 1);
    } else {
      warp_barrier();
    }
    store_one(p.y + t, load_shared_one(shared.tile, t ^ 1));
  }
};

// y[t] = tile[t], integers, so that no NaN shows the mistake. Broken: half the tile is written.
template <bool kBroken>
struct UnwrittenTile : Base<kBroken> {
  static constexpr const char* kName = "unwritten_tile";
  struct Shared {
    SharedArray<int, kThreads> tile;
  };
  SW_DEVICE static void run(const Params& p) {
    auto& shared = shared_memory<Shared>();
    const int t = thread_index();
    if (!kBroken || t < kThreads / 2) store_shared_one(shared.tile, t, t);
    block_barrier();
    store_one(p.y + t, float(load_shared_one(shared.tile, t)));
  }
};

// y[t] = x[t]. Broken: the index runs past the array.
template <bool kBroken>
struct OutsideSharedArray : Base<kBroken> {
  static constexpr const char* kName = "outside_shared_array";
  SW_DEVICE static void run(const Params& p) {
    auto& shared = shared_memory<typename Base<kBroken>::Shared>();
    const int t = thread_index() + (kBroken ? 1 : 0);
    store_shared_one(shared.tile, t, load_one(p.x + thread_index()));
    store_one(p.y + thread_index(), load_shared_one(shared.tile, t));
  }
};

// y[t] = x[t]. Broken: the launch asks for half of what the kernel uses.
template <bool kBroken>
struct TooLittleShared : Base<kBroken> {
  static constexpr const char* kName = "too_little_shared";
  static constexpr int kSharedBytes = Base<kBroken>::kSharedBytes / (kBroken ? 2 : 1);
  SW_DEVICE static void run(const Params& p) {
    auto& shared = shared_memory<typename Base<kBroken>::Shared>();
    const int t = thread_index();
    store_shared_one(shared.tile, t, load_one(p.x + t));
    store_one(p.y + t, load_shared_one(shared.tile, t));
  }
};

// y[0] = Σ x, in shared memory. Broken: every thread adds to the sum without an atomic.
template <bool kBroken>
struct SharedSumWithoutAtomic : Base<kBroken> {
  static constexpr const char* kName = "shared_sum_without_atomic";
  SW_DEVICE static void run(const Params& p) {
    auto& shared = shared_memory<typename Base<kBroken>::Shared>();
    const float x = load_one(p.x + thread_index());
    if (thread_index() == 0) store_shared_one(shared.tile, 0, 0.0f);
    block_barrier();
    if constexpr (kBroken) {
      store_shared_one(shared.tile, 0, load_shared_one(shared.tile, 0) + x);
    } else {
      atomic_add(shared.tile, 0, x);
    }
    block_barrier();
    if (thread_index() == 0) store_one(p.y, load_shared_one(shared.tile, 0));
  }
};

}  // namespace sw::broken
