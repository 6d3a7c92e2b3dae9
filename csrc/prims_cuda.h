// The primitive layer for nvcc; see prims.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <string.h>

namespace sw {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

constexpr int kSuccess = cudaSuccess;
constexpr int kInvalidValue = cudaErrorInvalidValue;
constexpr int kMisalignedAddress = cudaErrorMisalignedAddress;
constexpr int kUnasked = 48 << 10;  // bytes of shared memory that need no permission

inline const char* error_text(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

// Streaming multiprocessors of the current device; returns an error code.
inline int multiprocessors(int& count) {
  int device = 0;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
}

template <typename Kernel>
__global__ void __launch_bounds__(Kernel::kMaxThreads, Kernel::kMinBlocks)
kernel_entry(const __grid_constant__ typename Kernel::Params params) {
  Kernel::run(params);
}

template <typename Kernel>
int launch(const Launch& at, const typename Kernel::Params& params, void* stream) {
  if (at.shared_bytes > kUnasked) {
    constexpr auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (cudaError_t error =
            cudaFuncSetAttribute(kernel_entry<Kernel>, attribute, at.shared_bytes))
      return error;
  }
  kernel_entry<Kernel><<<dim3(at.blocks.x, at.blocks.y, at.blocks.z), at.threads, at.shared_bytes,
                         static_cast<cudaStream_t>(stream)>>>(params);
  return cudaGetLastError();
}

SW_DEVICE Dim3 block_index() { return {blockIdx.x, blockIdx.y, blockIdx.z}; }
SW_DEVICE Dim3 block_count() { return {gridDim.x, gridDim.y, gridDim.z}; }
SW_DEVICE int thread_index() { return int(threadIdx.x); }
SW_DEVICE int thread_count() { return int(blockDim.x); }

template <int kBytes>
struct Word;
template <>
struct Word<1> {
  using type = unsigned char;
};
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

template <typename T, int N>
using WordOf = typename Word<int(alignof(Vector<T, N>))>::type;

template <int N, Cache kCache = Cache::kDefault, typename T>
SW_DEVICE Vector<T, N> load(Global<const T> from) {
  using W = WordOf<T, N>;
  constexpr int kWords = sizeof(Vector<T, N>) / sizeof(W);
  const W* words = reinterpret_cast<const W*>(from.address);
  W value[kWords];
  SW_UNROLL
  for (int i = 0; i < kWords; ++i) {
    if constexpr (kCache == Cache::kStream) value[i] = __ldcs(words + i);
    if constexpr (kCache == Cache::kReuse) value[i] = __ldg(words + i);
    if constexpr (kCache == Cache::kDefault) value[i] = words[i];
  }
  Vector<T, N> result;
  memcpy(&result, value, sizeof(result));
  return result;
}

template <Cache kCache = Cache::kDefault, typename T, int N>
SW_DEVICE void store(Global<T> to, const Vector<T, N>& value) {
  using W = WordOf<T, N>;
  constexpr int kWords = sizeof(value) / sizeof(W);
  W words[kWords];
  memcpy(words, &value, sizeof(value));
  SW_UNROLL
  for (int i = 0; i < kWords; ++i) {
    W* target = reinterpret_cast<W*>(to.address) + i;
    if constexpr (kCache == Cache::kStream) {
      __stcs(target, words[i]);
    } else {
      *target = words[i];
    }
  }
}

SW_DEVICE void atomic_add(Global<float> to, float value) { atomicAdd(to.address, value); }

template <int N>
SW_DEVICE void atomic_add(SharedArray<float, N>& to, int index, float value) {
  atomicAdd(to.data + index, value);
}

template <typename S>
SW_DEVICE S& shared_memory() {
  extern __shared__ __align__(128) unsigned char sw_shared_bytes[];
  return *reinterpret_cast<S*>(sw_shared_bytes);
}

template <int N, typename T, int kSize>
SW_DEVICE Vector<T, N> load_shared(const SharedArray<T, kSize>& from, int index) {
  return *reinterpret_cast<const Vector<T, N>*>(from.data + index);
}

template <typename T, int N, int kSize>
SW_DEVICE void store_shared(SharedArray<T, kSize>& to, int index, const Vector<T, N>& value) {
  *reinterpret_cast<Vector<T, N>*>(to.data + index) = value;
}

constexpr unsigned kAllLanes = 0xffffffffu;

template <typename T>
SW_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}

template <typename T>
SW_DEVICE T shuffle_down(T value, int delta) {
  return __shfl_down_sync(kAllLanes, value, delta);
}

SW_DEVICE void block_barrier() { __syncthreads(); }
SW_DEVICE void warp_barrier() { __syncwarp(); }
SW_DEVICE void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

SW_DEVICE unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

SW_DEVICE void mbarrier_init(MBarrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals)
               : "memory");
}

SW_DEVICE void mbarrier_arrive(MBarrier& barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(
                   shared_address(&barrier))
               : "memory");
}

SW_DEVICE void mbarrier_wait(MBarrier& barrier, int parity) {
  int done = 0;
  while (!done) {
    asm volatile(
        "{\n.reg .pred passed;\n"
#if __CUDA_ARCH__ >= 900
        "mbarrier.try_wait.parity.shared.b64 passed, [%1], %2;\n"
#else
        "mbarrier.test_wait.parity.shared.b64 passed, [%1], %2;\n"
#endif
        "selp.b32 %0, 1, 0, passed;\n}"
        : "=r"(done)
        : "r"(shared_address(&barrier)), "r"(parity)
        : "memory");
  }
}

SW_DEVICE float to_float(float value) { return value; }
SW_DEVICE float to_float(bfloat16 value) { return __bfloat162float(value); }
SW_DEVICE float to_float(float16 value) { return __half2float(value); }

template <typename T>
SW_DEVICE T from_float(float value);
template <>
SW_DEVICE float from_float<float>(float value) {
  return value;
}
template <>
SW_DEVICE bfloat16 from_float<bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
SW_DEVICE float16 from_float<float16>(float value) {
  return __float2half_rn(value);
}

SW_DEVICE float reciprocal_sqrt(float value) { return rsqrtf(value); }

}  // namespace sw
