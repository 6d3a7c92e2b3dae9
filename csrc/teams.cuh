// Teams: the threads that hold one row together, and sums over them.
#pragma once

#include "prims.h"

namespace sw {

// `lanes` threads each, a power of two within a warp or a multiple of 32.
struct Team {
  int lanes, count;  // threads per team, teams per block
  int index, lane;   // of this thread

  SW_DEVICE static Team of_this_thread(int lanes) {
    return {lanes, thread_count() / lanes, thread_index() / lanes, thread_index() % lanes};
  }
};

constexpr int kMaxWarps = 32;

// Room for `kSums` sums per warp, twice: a sum may be taken while slower threads still read the one
// before, but not the one before that, since all of them passed the barrier between.
template <int kSums>
struct TeamExchange {
  SharedArray<float, 2 * kSums * kMaxWarps> warps;
};

// Every value summed over the team, the same bits in all its threads. All threads of the block
// take part; `turn` alternates 0 and 1. Several teams of more than a warp each need kNamed: such a
// kernel owns all 16 barriers of a block, of which a multiprocessor has 24 to 64, so that only one
// to four blocks are resident.
template <bool kNamed, int kSums, int kRoom>
SW_DEVICE void team_sum(float (&value)[kSums], const Team& team, TeamExchange<kRoom>& exchange,
                        int turn) {
  static_assert(kSums <= kRoom, "the exchange holds this many sums");
  for (int mask = (team.lanes < kWarp ? team.lanes : kWarp) / 2; mask > 0; mask /= 2) {
    SW_UNROLL
    for (int i = 0; i < kSums; ++i) value[i] += shuffle_xor(value[i], mask);
  }
  if (team.lanes <= kWarp) return;

  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  const int warps = team.lanes / kWarp, first = team.index * warps;
  SW_UNROLL
  for (int i = 0; i < kSums; ++i) {
    const int slot = (turn * kRoom + i) * kMaxWarps;
    if (lane == 0) store_shared_one(exchange.warps, slot + warp, value[i]);
  }
  if constexpr (kNamed) {
    named_barrier(1 + team.index, team.lanes);
  } else {
    block_barrier();
  }
  SW_UNROLL
  for (int i = 0; i < kSums; ++i) {
    const int slot = (turn * kRoom + i) * kMaxWarps + first;
    value[i] = lane < warps ? load_shared_one(exchange.warps, slot + lane) : 0.0f;
    SW_UNROLL
    for (int mask = kWarp / 2; mask > 0; mask /= 2) value[i] += shuffle_xor(value[i], mask);
  }
}

}  // namespace sw
