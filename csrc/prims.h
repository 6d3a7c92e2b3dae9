// The primitive layer: all that a kernel body may use of the machine.
//
// A body (a .cuh file) is written once over these functions. nvcc compiles it with prims_cuda.h to
// CUDA and PTX; with -DSW_EMULATE a C++17 compiler compiles it with emu/prims_emu.h, where a block
// runs on the CPU and every access is checked. Bodies use no CUDA builtin, dereference no pointer
// to global memory and touch shared memory only through these functions.
//
// A kernel is a struct: a name, launch bounds, its shared memory, its parameters, its body.
//
//   struct Scale {
//     static constexpr const char* kName = "scale";
//     static constexpr int kMaxThreads = 256, kMinBlocks = 1;
//     struct Shared {};
//     struct Params { Global<const float> x; Global<float> y; int64_t n; };
//     SW_DEVICE static void run(const Params& p);
//   };
//   int error = launch<Scale>({{n_blocks}, 256, sizeof(Scale::Shared)}, params, stream);
//
// Each face provides, beside what is declared below:
//
//   block_index(), block_count() -> Dim3; thread_index(), thread_count() -> int (one-dimensional)
//   load<N, Cache>(Global<const T>) -> Vector<T, N>, store<Cache>(Global<T>, Vector<T, N>):
//     one access per 16 bytes, aligned to its own size
//   atomic_add(Global<float>, float), atomic_add(SharedArray<float, N>&, index, float)
//   shared_memory<S>() -> S&; load_shared<N>(array, index), store_shared(array, index, Vector)
//   shuffle_xor(value, mask), shuffle_down(value, delta): all 32 lanes of a warp take part
//   block_barrier(); named_barrier(id 1 to 15, threads); warp_barrier(): memory is ordered too
//   mbarrier_init(b, arrivals), mbarrier_arrive(b), mbarrier_wait(b, parity)
//   to_float(T), from_float<T>(float) rounding to nearest even; reciprocal_sqrt(float)
#pragma once

#include <stdint.h>

#if defined(SW_EMULATE)
#define SW_DEVICE inline
#define SW_HOST_DEVICE inline
#define SW_UNROLL
#else
#define SW_DEVICE __device__ __forceinline__
#define SW_HOST_DEVICE __host__ __device__ __forceinline__
#define SW_UNROLL _Pragma("unroll")
#endif

namespace sw {

constexpr int kWarp = 32;
constexpr int kVectorBytes = 16;  // the widest access of one thread

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

// `shared_bytes` of dynamic shared memory hold the kernel's Shared struct, or a prefix of it.
struct Launch {
  Dim3 blocks;
  int threads;
  int shared_bytes = 0;
};

// What is known about the future of a line: nothing, that it is not read again soon, or that it is
// read-only during the launch and shared by many blocks.
enum class Cache { kDefault, kStream, kReuse };

template <typename T, int N>
struct alignas(sizeof(T) * N < kVectorBytes ? sizeof(T) * N : kVectorBytes) Vector {
  T data[N];
};

// A pointer to global memory that only load, store and atomic_add can follow.
template <typename T>
struct Global {
  T* address;

  SW_HOST_DEVICE Global operator+(int64_t elements) const { return {address + elements}; }
  SW_HOST_DEVICE explicit operator bool() const { return address != nullptr; }
};

// An array in shared memory, a member of a kernel's Shared struct.
template <typename T, int N>
struct SharedArray {
  static constexpr int kSize = N;
  alignas(sizeof(T) < kVectorBytes ? kVectorBytes : sizeof(T)) T data[N];
};

// A barrier in shared memory. It completes its phase 0 when the given number of arrivals has come,
// then phase 1, and so on; a wait for parity p passes once the last completed phase has parity p.
struct MBarrier {
  uint64_t state;
};

}  // namespace sw

#if defined(SW_EMULATE)
#include "emu/prims_emu.h"
#else
#include "prims_cuda.h"
#endif

namespace sw {

template <Cache kCache = Cache::kDefault, typename T>
SW_DEVICE T load_one(Global<const T> from) {
  return load<1, kCache>(from).data[0];
}

template <typename T>
SW_DEVICE void store_one(Global<T> to, T value) {
  store(to, Vector<T, 1>{{value}});
}

template <typename T, int kSize>
SW_DEVICE T load_shared_one(const SharedArray<T, kSize>& from, int index) {
  return load_shared<1>(from, index).data[0];
}

template <typename T, int kSize>
SW_DEVICE void store_shared_one(SharedArray<T, kSize>& to, int index, T value) {
  store_shared(to, index, Vector<T, 1>{{value}});
}

}  // namespace sw
