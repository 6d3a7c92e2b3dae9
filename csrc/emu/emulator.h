// Runs a kernel body on the CPU, one block after the other, and checks everything it does.
//
// The threads of a block are fibers, switched where they wait for each other. Reported, each with
// the kernel, the block, the thread and the address:
//   - a deadlock, with what every thread waits for: a barrier that not all threads reach, a wait
//     for the wrong parity, a shuffle that not all lanes take part in;
//   - a block barrier reached at different places by threads of one block, a shuffle whose lanes
//     disagree about the operation;
//   - shared memory: reads of bytes that nothing wrote, accesses outside an array or outside what
//     the launch asked for, and races, found with vector clocks: two threads touch a byte, one of
//     them writes, and no barrier lies between (a shuffle orders no memory);
//   - global memory: accesses outside every registered buffer, stores to read-only buffers,
//     misaligned vectors, two threads of a launch that write one byte, and reads of a byte that
//     another thread wrote in the same launch, without a barrier in between. A block that used an
//     atomic may read what other blocks wrote: such a protocol is not followed further;
//   - mbarriers used before they are initialised, or before that is visible to the thread.
//
// What it cannot catch: missing fences between blocks and between the generic and the asynchronous
// proxy; orders of blocks and threads other than its own (blocks run one at a time, threads from
// the first to the last); warps that diverge where the machine wants them converged, apart from
// shuffles; registers, bank conflicts and everything about speed; differences of rounding, since
// nvcc contracts a * b + c and the CPU compiler does not; accesses that bypass the primitives.
//
// Not thread-safe: one launch at a time. After a fault the launch is abandoned.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sw::emu {

constexpr int kFault = 10001;  // the error code of a launch that broke a rule

enum class Access { kRead, kWrite, kAtomic };
enum class Shuffle { kXor, kDown };

struct Grid {
  const char* name;
  unsigned blocks[3];
  int threads;
  int max_threads;  // the kernel's launch bound
  size_t shared_bytes;
};

// Runs body(params) in every thread of the grid: 0, an error of the launch itself, or kFault.
int launch(const Grid& grid, void (*body)(const void*), const void* params);
const char* last_fault();

// Makes `bytes` bytes accessible to the launches that follow, until clear_buffers().
void register_buffer(const void* begin, int64_t bytes, bool writable, const char* name);
void clear_buffers();

// The rest is called by the primitives, inside a launch.
const unsigned* block_index();
const unsigned* block_count();
int thread_index();
int thread_count();
void global_access(const void* address, size_t bytes, size_t alignment, Access access);
void* shared_memory();
void shared_access(const void* address, size_t bytes, size_t alignment, Access access);
void outside_array(const void* array, int64_t index, int64_t count, int64_t size, int item);
uint64_t shuffle(Shuffle kind, uint64_t value, int operand);
void block_barrier(const char* file, int line);
void named_barrier(int id, int threads);
void warp_barrier();
void mbarrier_init(const void* barrier, int arrivals);
void mbarrier_arrive(const void* barrier);
void mbarrier_wait(const void* barrier, int parity);

}  // namespace sw::emu
