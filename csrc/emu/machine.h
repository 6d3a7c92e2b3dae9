// The emulated machine: what scheduler.cpp and memory.cpp share. See emulator.h.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <map>
#include <string>
#include <vector>

#include "emu/clocks.h"
#include "emu/emulator.h"

namespace sw::emu {

constexpr int kLanes = 32;
constexpr int kNamedBarriers = 16;

enum class Waits { kNot, kBlockBarrier, kNamedBarrier, kWarp, kMBarrier, kFinished };

struct Fiber {
  ucontext_t first;
  jmp_buf resume;
  void* stack = nullptr;
  bool started = false;
  Waits waits = Waits::kNot;
  int64_t what = 0;  // the barrier waited for, or its address
  int parity = 0;
  Clock clock;
};

struct Barrier {
  int arrived = 0, expected = 0;
  std::vector<int> threads;
};

// What the lanes of one warp do together. A lane is at most one exchange ahead of the others.
struct Warp {
  int arrived = 0;
  uint64_t generation = 0;
  const char* operation = nullptr;
  int operand = 0;
  uint64_t values[2][kLanes];
};

struct MBarrierState {
  int expected, pending;
  int phase = 0;
  int initialiser;
  uint32_t init_count;
  Base arrivals, completed;
};

struct Buffer {
  uintptr_t begin, end;
  bool writable;
  std::string name;
  std::vector<GlobalByte> bytes;
};

struct Machine {
  Grid grid{};
  void (*body)(const void*) = nullptr;
  const void* params = nullptr;
  unsigned block[3] = {0, 0, 0};
  uint32_t block_number = 0, launch_number = 0;
  int current = 0;
  bool faulted = false, used_atomics = false;
  std::string fault;
  jmp_buf scheduler;
  std::vector<Fiber> fibers;
  std::vector<unsigned char> shared;
  unsigned char* shared_begin = nullptr;
  std::vector<SharedByte> shadow;
  Barrier barrier;
  const char* barrier_file = nullptr;
  int barrier_line = 0;
  Barrier named[kNamedBarriers];
  std::vector<Warp> warps;
  std::map<const void*, MBarrierState> mbarriers;
  std::vector<Buffer> buffers;
  size_t last_buffer = 0;
};

Machine& machine();

// The fiber that runs.
inline Fiber& self() { return machine().fibers[machine().current]; }

// Ends the launch with a report: kernel, block, thread, and what `format` says of it.
[[noreturn]] void fail(const char* format, ...);

}  // namespace sw::emu
