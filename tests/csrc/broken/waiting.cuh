// Mistakes with barriers, shuffles and mbarriers. kBroken makes the mistake.
#pragma once

#include "shared_memory.cuh"

namespace sw::broken {

// y[t] = x[t]. Broken: the second warp leaves without coming to the barrier.
template <bool kBroken>
struct BarrierNotReached : Base<kBroken> {
  static constexpr const char* kName = "barrier_not_reached";
  SW_DEVICE static void run(const Params& p) {
    const int t = thread_index();
    store_one(p.y + t, load_one(p.x + t));
    if (kBroken && t >= kWarp) return;
    block_barrier();
  }
};

// y[t] = x[t]. Broken: the two warps wait at barriers in different places of the program.
template <bool kBroken>
struct DivergentBarrier : Base<kBroken> {
  static constexpr const char* kName = "divergent_barrier";
  SW_DEVICE static void run(const Params& p) {
    const int t = thread_index();
    if (kBroken && t < kWarp) {
      block_barrier();
      store_one(p.y + t, load_one(p.x + t));
    } else {
      store_one(p.y + t, load_one(p.x + t));
      block_barrier();
    }
  }
};

// y[t] = x[t]. Broken: a named barrier for more threads than come to it.
template <bool kBroken>
struct NamedBarrierCount : Base<kBroken> {
  static constexpr const char* kName = "named_barrier_count";
  SW_DEVICE static void run(const Params& p) {
    const int t = thread_index();
    if (t < kWarp) named_barrier(3, kBroken ? 2 * kWarp : kWarp);
    store_one(p.y + t, load_one(p.x + t));
  }
};

// y[t] = the sum of x over its warp. Broken: the odd lanes leave before the shuffles.
template <bool kBroken>
struct ShuffleOfHalfAWarp : Base<kBroken> {
  static constexpr const char* kName = "shuffle_of_half_a_warp";
  SW_DEVICE static void run(const Params& p) {
    const int t = thread_index();
    float sum = load_one(p.x + t);
    if (kBroken && t % 2 == 1) return;
    for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    store_one(p.y + t, sum);
  }
};

// y[t] = x[t ^ 1]. Broken: the lanes of a warp disagree about the exchange.
template <bool kBroken>
struct DivergentShuffle : Base<kBroken> {
  static constexpr const char* kName = "divergent_shuffle";
  SW_DEVICE static void run(const Params& p) {
    const int t = thread_index();
    const float x = load_one(p.x + t);
    store_one(p.y + t, shuffle_xor(x, kBroken && t % 4 >= 2 ? 2 : 1));
  }
};

// The first warp brings x to the second, kTurns times through one tile: full and empty count turns.
constexpr int kTurns = 3;

template <bool kBroken>
struct Pipeline : Base<kBroken> {
  struct Shared {
    SharedArray<float, kWarp> tile;
    MBarrier full, empty;
  };
  static constexpr int kSharedBytes = sizeof(Shared);

  // `late`: the barriers are used before all threads know of them. `ahead`: the consumer waits for
  // the phase before. `first`: the parity the producer begins with.
  SW_DEVICE static void pass(const Params& p, bool late, bool ahead, int first) {
    auto& shared = shared_memory<Shared>();
    const int lane = thread_index() % kWarp;
    if (thread_index() == 0) {
      mbarrier_init(shared.full, kWarp);
      mbarrier_init(shared.empty, kWarp);
    }
    if (!late) block_barrier();
    for (int turn = 0; turn < kTurns; ++turn) {
      if (thread_index() < kWarp) {
        mbarrier_wait(shared.empty, first ^ (turn & 1));
        store_shared_one(shared.tile, lane, (turn + 1) * load_one(p.x + lane));
        mbarrier_arrive(shared.full);
      } else {
        mbarrier_wait(shared.full, (turn & 1) ^ (ahead ? 1 : 0));
        const float x = load_shared_one(shared.tile, kWarp - 1 - lane);
        mbarrier_arrive(shared.empty);
        store_one(p.y + lane, x);
      }
    }
  }
};

// Broken: the producer waits for a phase that only its own work can complete.
template <bool kBroken>
struct WrongParity : Pipeline<kBroken> {
  static constexpr const char* kName = "wrong_parity";
  SW_DEVICE static void run(const Params& p) {
    Pipeline<kBroken>::pass(p, false, false, kBroken ? 0 : 1);
  }
};

// Broken: the consumer's wait passes before the tile is there.
template <bool kBroken>
struct ParityOfThePhaseBefore : Pipeline<kBroken> {
  static constexpr const char* kName = "parity_of_the_phase_before";
  SW_DEVICE static void run(const Params& p) { Pipeline<kBroken>::pass(p, false, kBroken, 1); }
};

// Broken: no barrier after the initialisation.
template <bool kBroken>
struct LateInitialisation : Pipeline<kBroken> {
  static constexpr const char* kName = "late_initialisation";
  SW_DEVICE static void run(const Params& p) { Pipeline<kBroken>::pass(p, kBroken, false, 1); }
};

}  // namespace sw::broken
