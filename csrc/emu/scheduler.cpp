// Fibers, their scheduler, and everything that threads wait for; see emulator.h.
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "emu/machine.h"

namespace sw::emu {
namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr int kMostThreads = 1024;

std::string place() {
  const Machine& m = machine();
  char text[160];
  snprintf(text, sizeof(text), "%s: block (%u, %u, %u), thread %d", m.grid.name, m.block[0],
           m.block[1], m.block[2], m.current);
  return text;
}

}  // namespace

Machine& machine() {
  static Machine* const only = new Machine;  // never destroyed: fibers live on its stacks
  return *only;
}

void fail(const char* format, ...) {
  char text[640];
  va_list values;
  va_start(values, format);
  vsnprintf(text, sizeof(text), format, values);
  va_end(values);
  Machine& m = machine();
  m.fault = place() + " " + text;
  m.faulted = true;
  _longjmp(m.scheduler, 1);
}

namespace {

// Back to the scheduler until it resumes this fiber.
void yield() {
  if (_setjmp(self().resume) == 0) _longjmp(machine().scheduler, 1);
}

void enter_body() {
  for (;;) {
    machine().body(machine().params);
    self().waits = Waits::kFinished;
    yield();
  }
}

void resume(int thread) {
  Machine& m = machine();
  m.current = thread;
  Fiber& fiber = m.fibers[thread];
  if (_setjmp(m.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.first);
}

void prepare_start(Fiber& fiber) {
  getcontext(&fiber.first);
  fiber.first.uc_stack.ss_sp = fiber.stack;
  fiber.first.uc_stack.ss_size = kStackBytes;
  fiber.first.uc_link = nullptr;
  makecontext(&fiber.first, enter_body, 0);
}

// Fibers that ended a body wait for the next one; others start on their stacks.
bool prepare_fibers(int threads) {
  Machine& m = machine();
  while (int(m.fibers.size()) < threads) {
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) return false;
    m.fibers.emplace_back();
    m.fibers.back().stack = stack;
  }
  for (Fiber& fiber : m.fibers)
    if (!fiber.started) prepare_start(fiber);
  return true;
}

void prepare_block() {
  Machine& m = machine();
  const int threads = m.grid.threads;
  const Base nothing = std::make_shared<const std::vector<uint32_t>>(threads, 0);
  for (int t = 0; t < threads; ++t) {
    m.fibers[t].waits = Waits::kNot;
    m.fibers[t].clock = {nothing, 1};
  }
  // NaN in every floating-point type, beside the record of what was written.
  m.shared.assign(m.grid.shared_bytes + 1024, 0xff);
  const uintptr_t begin = reinterpret_cast<uintptr_t>(m.shared.data());
  m.shared_begin = m.shared.data() + ((begin + 1023) / 1024 * 1024 - begin);
  m.shadow.clear();
  m.shadow.resize(m.grid.shared_bytes);
  m.barrier = {};
  for (Barrier& barrier : m.named) barrier = {};
  m.warps.assign((threads + kLanes - 1) / kLanes, Warp{});
  m.mbarriers.clear();
  m.used_atomics = false;
}

std::string describe_wait(const Fiber& fiber) {
  const Machine& m = machine();
  char text[120];
  switch (fiber.waits) {
    case Waits::kFinished:
      return "finished";
    case Waits::kBlockBarrier:
      return "at the block barrier";
    case Waits::kNamedBarrier: {
      const Barrier& b = m.named[fiber.what];
      snprintf(text, sizeof(text), "at named barrier %d (%d of %d arrived)", int(fiber.what),
               b.arrived, b.expected);
      return text;
    }
    case Waits::kWarp:
      return std::string("in ") + m.warps[fiber.what].operation;
    default: {
      const auto* address = reinterpret_cast<const unsigned char*>(fiber.what);
      const MBarrierState& b = m.mbarriers.at(address);
      snprintf(text, sizeof(text),
               "at the mbarrier at shared+0x%zx for parity %d (phase %d, %d of %d arrived)",
               size_t(address - m.shared_begin), fiber.parity, b.phase, b.expected - b.pending,
               b.expected);
      return text;
    }
  }
}

void report_deadlock() {
  Machine& m = machine();
  std::string waiting;
  for (int first = 0; first < m.grid.threads;) {
    const std::string what = describe_wait(m.fibers[first]);
    int last = first;
    while (last + 1 < m.grid.threads && describe_wait(m.fibers[last + 1]) == what) ++last;
    char range[48];
    snprintf(range, sizeof(range), first == last ? "; %d " : "; %d-%d ", first, last);
    if (waiting.size() < 480) waiting += range + what;
    first = last + 1;
  }
  m.current = 0;
  while (m.fibers[m.current].waits == Waits::kFinished) ++m.current;
  m.fault = place() + " is in a deadlock: no thread can go on. Threads" + waiting.substr(1);
  m.faulted = true;
}

void run_block() {
  Machine& m = machine();
  prepare_block();
  for (int finished = 0; finished < m.grid.threads && !m.faulted;) {
    bool progress = false;
    for (int t = 0; t < m.grid.threads && !m.faulted; ++t) {
      if (m.fibers[t].waits != Waits::kNot) continue;
      progress = true;
      resume(t);
      finished += m.fibers[t].waits == Waits::kFinished;
    }
    if (!progress && !m.faulted) report_deadlock();
  }
}

// Lets `threads` go on, each knowing what all of them did before.
void release(const int* threads, int count) {
  Machine& m = machine();
  Join join(m.grid.threads);
  for (int i = 0; i < count; ++i) join.add(threads[i], m.fibers[threads[i]].clock);
  const Base base = join.base();
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = m.fibers[threads[i]];
    fiber.clock.base = base;
    ++fiber.clock.count;
    fiber.waits = Waits::kNot;
  }
}

void arrive_and_wait(Barrier& barrier, int expected, Waits how, int64_t what) {
  barrier.expected = expected;
  barrier.threads.push_back(machine().current);
  if (++barrier.arrived == expected) {
    release(barrier.threads.data(), expected);
    barrier = {};
    return;
  }
  self().waits = how;
  self().what = what;
  yield();
}

// Waits until all lanes of the warp have come to the same operation; returns its generation.
uint64_t meet_warp(const char* operation, int operand, uint64_t value, bool orders_memory) {
  Machine& m = machine();
  const int lane = m.current % kLanes, first = m.current - lane;
  Warp& warp = m.warps[first / kLanes];
  const uint64_t generation = warp.generation;
  if (warp.arrived == 0) {
    warp.operation = operation, warp.operand = operand;
  } else if (strcmp(warp.operation, operation) != 0 || warp.operand != operand) {
    fail("is in a divergent warp: %s by %d, while other lanes of the warp are at %s by %d",
         operation, operand, warp.operation, warp.operand);
  }
  warp.values[generation % 2][lane] = value;
  self().waits = Waits::kWarp;
  self().what = first / kLanes;
  if (++warp.arrived < kLanes) {
    yield();
    return generation;
  }
  warp.arrived = 0;
  ++warp.generation;
  int lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    lanes[i] = first + i;
    m.fibers[lanes[i]].waits = Waits::kNot;
  }
  if (orders_memory) release(lanes, kLanes);
  return generation;
}

MBarrierState& find_mbarrier(const void* barrier, const char* operation) {
  Machine& m = machine();
  const auto found = m.mbarriers.find(barrier);
  if (found == m.mbarriers.end())
    fail("%s an mbarrier at shared+0x%zx that was never initialised", operation,
         size_t(static_cast<const unsigned char*>(barrier) - m.shared_begin));
  MBarrierState& b = found->second;
  if (!happened_before(b.initialiser, b.init_count, m.current, self().clock))
    fail("%s the mbarrier at shared+0x%zx, which thread %d initialised without a barrier in "
         "between",
         operation, size_t(static_cast<const unsigned char*>(barrier) - m.shared_begin),
         b.initialiser);
  return b;
}

}  // namespace

const char* last_fault() { return machine().fault.c_str(); }

int launch(const Grid& grid, void (*body)(const void*), const void* params) {
  Machine& m = machine();
  constexpr int kOutOfMemory = 2, kInvalidConfiguration = 9;  // as cudaError_t has them
  const unsigned* n = grid.blocks;
  if (grid.threads < 1 || grid.threads > kMostThreads || grid.threads > grid.max_threads ||
      n[0] < 1 || n[1] < 1 || n[2] < 1 || n[1] > 65535 || n[2] > 65535)
    return kInvalidConfiguration;
  m.grid = grid, m.body = body, m.params = params;
  m.faulted = false;
  ++m.launch_number;
  m.block_number = 0;
  if (!prepare_fibers(grid.threads)) return kOutOfMemory;
  for (m.block[2] = 0; m.block[2] < n[2]; ++m.block[2])
    for (m.block[1] = 0; m.block[1] < n[1]; ++m.block[1])
      for (m.block[0] = 0; m.block[0] < n[0]; ++m.block[0], ++m.block_number) {
        run_block();
        if (m.faulted) {
          // They stopped in the middle of the body: the next launch starts them afresh.
          for (Fiber& fiber : m.fibers) fiber.started = false;
          return kFault;
        }
      }
  return 0;
}

const unsigned* block_index() { return machine().block; }
const unsigned* block_count() { return machine().grid.blocks; }
int thread_index() { return machine().current; }
int thread_count() { return machine().grid.threads; }

uint64_t shuffle(Shuffle kind, uint64_t value, int operand) {
  const int thread = machine().current, lane = thread % kLanes;
  const char* name = kind == Shuffle::kXor ? "shuffle_xor" : "shuffle_down";
  const uint64_t generation = meet_warp(name, operand, value, false);
  const int source = kind == Shuffle::kXor ? lane ^ operand : lane + operand;
  if (source < 0 || (kind == Shuffle::kXor && source >= kLanes))
    fail("%s by %d leaves the warp", name, operand);
  // A lane beyond the last keeps its own value.
  const Warp& warp = machine().warps[thread / kLanes];
  return warp.values[generation % 2][source < kLanes ? source : lane];
}

void warp_barrier() { meet_warp("warp_barrier", 0, 0, true); }

void block_barrier(const char* file, int line) {
  Machine& m = machine();
  if (m.barrier.arrived == 0) {
    m.barrier_file = file, m.barrier_line = line;
  } else if (m.barrier_line != line || strcmp(m.barrier_file, file) != 0) {
    fail("is at a divergent barrier: it waits at %s:%d, other threads of the block at %s:%d", file,
         line, m.barrier_file, m.barrier_line);
  }
  arrive_and_wait(m.barrier, m.grid.threads, Waits::kBlockBarrier, 0);
}

void named_barrier(int id, int threads) {
  Machine& m = machine();
  if (id < 1 || id >= kNamedBarriers || threads < kLanes || threads % kLanes != 0)
    fail("uses named barrier %d for %d threads; accepted: 1 to 15, a multiple of 32", id, threads);
  Barrier& barrier = m.named[id];
  if (barrier.arrived != 0 && barrier.expected != threads)
    fail("is at a divergent barrier: it waits at named barrier %d for %d threads, others for %d",
         id, threads, barrier.expected);
  arrive_and_wait(barrier, threads, Waits::kNamedBarrier, id);
}

void mbarrier_init(const void* barrier, int arrivals) {
  Machine& m = machine();
  shared_access(barrier, sizeof(uint64_t), sizeof(uint64_t), Access::kWrite);
  if (arrivals < 1) fail("initialises an mbarrier for %d arrivals", arrivals);
  const Base nothing = std::make_shared<const std::vector<uint32_t>>(m.grid.threads, 0);
  m.mbarriers[barrier] = {arrivals, arrivals, 0, m.current, self().clock.count, nothing, nothing};
}

void mbarrier_arrive(const void* barrier) {
  Machine& m = machine();
  MBarrierState& b = find_mbarrier(barrier, "arrives at");
  Join join(m.grid.threads);
  join.add(b.arrivals);
  join.add(m.current, self().clock);
  b.arrivals = join.base();
  ++self().clock.count;
  if (--b.pending > 0) return;
  b.pending = b.expected;
  b.phase ^= 1;
  b.completed = b.arrivals;
  for (Fiber& fiber : m.fibers)
    if (fiber.waits == Waits::kMBarrier && fiber.what == reinterpret_cast<int64_t>(barrier))
      fiber.waits = Waits::kNot;
}

void mbarrier_wait(const void* barrier, int parity) {
  Machine& m = machine();
  for (;;) {
    MBarrierState& b = find_mbarrier(barrier, "waits at");
    // `phase` is the parity of the phase in progress: the last completed one has the other.
    if (b.phase != (parity & 1)) {
      Join join(m.grid.threads);
      join.add(b.completed);
      join.add(self().clock.base);
      self().clock.base = join.base();
      return;
    }
    self().waits = Waits::kMBarrier;
    self().what = reinterpret_cast<int64_t>(barrier);
    self().parity = parity;
    yield();
  }
}

}  // namespace sw::emu
