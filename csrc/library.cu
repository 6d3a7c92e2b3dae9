// The library's own functions, and the copy that measures the device's memory bandwidth.
#include "abi.h"
#include "copy.cuh"

namespace {

bool overlap(const char* a, const char* b, int64_t bytes) { return a < b + bytes && b < a + bytes; }

}  // namespace

SW_EXPORT int sw_abi_version() { return SW_ABI_VERSION; }

// The architectures the kernels were compiled for, as given to nvcc: "80;90a;100a".
SW_EXPORT const char* sw_build_archs() { return SW_BUILD_ARCHS; }

SW_EXPORT const char* sw_error_string(int error) { return sw::error_text(error); }

// Copies `bytes` bytes between two non-overlapping buffers of the current device, both aligned to
// 16 bytes. It moves 2 * bytes: time it for the bandwidth other kernels are held against.
SW_EXPORT int sw_measure_copy(void* dst, const void* src, int64_t bytes, void* stream) {
  using namespace sw;
  char* to = static_cast<char*>(dst);
  const char* from = static_cast<const char*>(src);
  if (bytes < 0) return kInvalidValue;
  if (bytes == 0) return kSuccess;
  if (to == nullptr || from == nullptr || overlap(to, from, bytes)) return kInvalidValue;
  const uintptr_t address = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
  if (address % kVectorBytes != 0) return kMisalignedAddress;

  int count = 0;
  if (int error = multiprocessors(count)) return error;
  const int64_t vectors = bytes / kVectorBytes;
  const int64_t needed = (vectors + MeasureCopy::kTile - 1) / MeasureCopy::kTile;
  const int64_t resident = int64_t(count) * MeasureCopy::kMinBlocks;
  const int64_t blocks = needed < 1 ? 1 : needed < resident ? needed : resident;
  return launch<MeasureCopy>({{unsigned(blocks)}, MeasureCopy::kMaxThreads},
                             {{to}, {from}, vectors, int(bytes % kVectorBytes)}, stream);
}
