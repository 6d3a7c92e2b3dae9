// The library's own functions, and the copy that measures the device's memory bandwidth.
#include "abi.h"

namespace {

constexpr int kThreads = 256;
constexpr int kVectorsPerThread = 4;  // independent 16-byte loads in flight per thread
constexpr int kBlocksPerSm = 8;       // 2,048 threads: every SM of sm_80 to sm_100 is full

using Vector = uint4;

static_assert(sizeof(Vector) == 16, "the widest load of one thread");

// dst[i] = src[i] for 16 * vectors + tail bytes; tail < 16.
// Neither side is read again, so both bypass the caches' replacement order (ldcs, stcs).
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
measure_copy_kernel(char* __restrict__ dst, const char* __restrict__ src, int64_t vectors,
                    int tail) {
  Vector* to = reinterpret_cast<Vector*>(dst);
  const Vector* from = reinterpret_cast<const Vector*>(src);
  const int64_t tile = int64_t(kThreads) * kVectorsPerThread;
  const int64_t stride = tile * gridDim.x;

  for (int64_t base = tile * blockIdx.x + threadIdx.x; base < vectors; base += stride) {
    Vector value[kVectorsPerThread];
#pragma unroll
    for (int j = 0; j < kVectorsPerThread; ++j) {
      const int64_t i = base + int64_t(j) * kThreads;
      if (i < vectors) value[j] = __ldcs(from + i);
    }
#pragma unroll
    for (int j = 0; j < kVectorsPerThread; ++j) {
      const int64_t i = base + int64_t(j) * kThreads;
      if (i < vectors) __stcs(to + i, value[j]);
    }
  }

  if (blockIdx.x == 0 && threadIdx.x < tail) {
    const int64_t i = vectors * int64_t(sizeof(Vector)) + threadIdx.x;
    dst[i] = src[i];
  }
}

bool overlap(const char* a, const char* b, int64_t bytes) { return a < b + bytes && b < a + bytes; }

}  // namespace

SW_EXPORT int sw_abi_version() { return SW_ABI_VERSION; }

// The architectures the kernels were compiled for, as given to nvcc: "80;90a;100a".
SW_EXPORT const char* sw_build_archs() { return SW_BUILD_ARCHS; }

SW_EXPORT const char* sw_error_string(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

// Copies `bytes` bytes between two non-overlapping buffers of the current device, both aligned to
// 16 bytes. It moves 2 * bytes: time it for the bandwidth other kernels are held against.
SW_EXPORT int sw_measure_copy(void* dst, const void* src, int64_t bytes, void* stream) {
  char* to = static_cast<char*>(dst);
  const char* from = static_cast<const char*>(src);
  if (bytes < 0) return cudaErrorInvalidValue;
  if (bytes == 0) return cudaSuccess;
  if (to == nullptr || from == nullptr || overlap(to, from, bytes)) return cudaErrorInvalidValue;
  const uintptr_t address = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
  if (address % sizeof(Vector) != 0) return cudaErrorMisalignedAddress;

  int device = 0, sms = 0;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  if (cudaError_t error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device))
    return error;

  const int64_t vectors = bytes / int64_t(sizeof(Vector));
  const int64_t tile = int64_t(kThreads) * kVectorsPerThread;
  const int64_t needed = (vectors + tile - 1) / tile;
  const int64_t resident = int64_t(sms) * kBlocksPerSm;
  const int64_t blocks = needed < 1 ? 1 : needed < resident ? needed : resident;
  measure_copy_kernel<<<static_cast<unsigned>(blocks), kThreads, 0,
                        static_cast<cudaStream_t>(stream)>>>(
      to, from, vectors, static_cast<int>(bytes % int64_t(sizeof(Vector))));
  return cudaGetLastError();
}
