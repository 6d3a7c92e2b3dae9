// How the norm kernels are launched, from the problem's size alone.
//
// A row is cut into chunks of `chunk` elements: 16 bytes, or one element where a row's width,
// stride or address rules vectors out. A team of `lanes` threads holds a row, chunk c in lane
// c % lanes: a power of two within a warp, or whole warps. A block is `teams` teams.
#pragma once

#include <stdint.h>

namespace sw {

// Chunks per thread of the instantiated kernels; 0: a loop over as many as the row needs, which
// reads the row again for every pass.
constexpr int kForwardFew = 1, kForwardMany = 4;
constexpr int kBackwardChunks = 2, kBackwardManyChunks = 4, kBackwardScalars = 8;
constexpr int kAnyChunks = 0;

// The widest row that a forward block holds in registers.
constexpr int kHeldWidth = 16384;

// 512 threads of at most 128 registers fill a multiprocessor.
constexpr int kBackwardThreads = 512;
constexpr int kForwardThreads = 128;
constexpr int kAnyThreads = 512;
constexpr int kLanesOfWarp = 32;

struct NormPlan {
  int chunk;  // elements
  int chunks_per_thread;
  int lanes, teams;
  int64_t blocks;

  constexpr int threads() const { return lanes * teams; }
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// At least `needed` lanes that a team may have.
constexpr int team_lanes(int64_t needed) {
  if (needed > kLanesOfWarp) return int(ceil_div(needed, kLanesOfWarp)) * kLanesOfWarp;
  int lanes = 1;
  while (lanes < needed) lanes *= 2;
  return lanes;
}

constexpr int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

// One row per team. Teams of several warps have a block each, since teams that share one would
// need the named barriers, which leave too few blocks resident.
constexpr NormPlan norm_forward_plan(int64_t rows, int width, int item_bytes, bool vector) {
  NormPlan plan{};
  vector = vector && width <= kHeldWidth;
  plan.chunk = vector ? 16 / item_bytes : 1;
  const int64_t chunks = ceil_div(width, plan.chunk);
  if (vector) {
    plan.chunks_per_thread = chunks <= kLanesOfWarp ? kForwardFew : kForwardMany;
    plan.lanes = team_lanes(ceil_div(chunks, plan.chunks_per_thread));
  } else {
    plan.chunks_per_thread = kAnyChunks;
    plan.lanes = team_lanes(clamp(ceil_div(chunks, 4), 1, kAnyThreads));
  }
  plan.teams = plan.lanes <= kLanesOfWarp ? kForwardThreads / plan.lanes : 1;
  plan.blocks = ceil_div(rows, plan.teams);
  return plan;
}

// One block per multiprocessor that walks over its rows, so that few partial sums are left, with as
// many teams as there are rows for them; every block has the same number of turns, or one less.
constexpr NormPlan norm_backward_plan(int64_t rows, int width, int item_bytes, bool vector,
                                      int multiprocessors) {
  NormPlan plan{};
  plan.chunk = vector ? 16 / item_bytes : 1;
  const int64_t chunks = ceil_div(width, plan.chunk);
  plan.chunks_per_thread = vector ? kBackwardChunks : kBackwardScalars;
  int64_t lanes = ceil_div(chunks, plan.chunks_per_thread);
  // Twice the elements of float32 fit the registers when no row is loaded ahead.
  if (lanes > kBackwardThreads && vector && item_bytes == 4) {
    plan.chunks_per_thread = kBackwardManyChunks;
    lanes = ceil_div(chunks, plan.chunks_per_thread);
  }
  plan.teams = 1;
  if (lanes > kBackwardThreads) {
    plan.chunks_per_thread = kAnyChunks;
    plan.lanes = kAnyThreads;
  } else {
    plan.lanes = team_lanes(lanes);
    // Whole warps: several teams where a team is part of one.
    const int unit = plan.lanes < kLanesOfWarp ? kLanesOfWarp / plan.lanes : 1;
    const int64_t most = kBackwardThreads / (unit * plan.lanes);
    plan.teams = unit * int(clamp(rows / (int64_t(multiprocessors) * unit), 1, most));
  }
  const int64_t turns = ceil_div(rows, plan.teams);
  plan.blocks = ceil_div(turns, clamp(ceil_div(turns, multiprocessors), 1, turns));
  return plan;
}

static_assert(norm_forward_plan(4096, 768, 2, true).lanes == 32, "GPT-2: a warp per row");
static_assert(norm_forward_plan(1, kHeldWidth, 4, true).threads() == 1024, "one block at most");
static_assert(norm_forward_plan(1, kHeldWidth, 2, true).threads() == 512, "one block at most");
static_assert(norm_backward_plan(4096, 8192, 2, true, 132).chunks_per_thread == kBackwardChunks,
              "LLaMA widths in half precision load a row ahead");
static_assert(norm_backward_plan(4096, 8192, 4, true, 132).chunks_per_thread ==
                  kBackwardManyChunks,
              "and in single precision stay in registers");

}  // namespace sw
