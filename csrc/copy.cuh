// The copy that measures the device's memory bandwidth.
#pragma once

#include "prims.h"

namespace sw {

// dst[i] = src[i] for 16 * vectors + tail bytes; tail < 16. Neither side is read again.
struct MeasureCopy {
  static constexpr const char* kName = "measure_copy";
  static constexpr int kMaxThreads = 256;
  static constexpr int kMinBlocks = 6;  // 1,536 threads, all that an SM of sm_120 holds
  static constexpr int kVectorsPerThread = 4;  // independent loads in flight per thread
  static constexpr int64_t kTile = int64_t(kMaxThreads) * kVectorsPerThread;

  struct Params {
    Global<char> dst;
    Global<const char> src;
    int64_t vectors;
    int tail;
  };

  using Bytes = Vector<char, kVectorBytes>;

  SW_DEVICE static void run(const Params& p) {
    const int64_t stride = kTile * block_count().x;
    for (int64_t base = kTile * block_index().x + thread_index(); base < p.vectors;
         base += stride) {
      const int64_t left = p.vectors - base;
      const Global<const char> from = p.src + base * kVectorBytes;
      const Global<char> to = p.dst + base * kVectorBytes;
      Bytes value[kVectorsPerThread];
      SW_UNROLL
      for (int j = 0; j < kVectorsPerThread; ++j)
        if (j * kMaxThreads < left)
          value[j] = load<kVectorBytes, Cache::kStream>(from + j * kMaxThreads * kVectorBytes);
      SW_UNROLL
      for (int j = 0; j < kVectorsPerThread; ++j)
        if (j * kMaxThreads < left)
          store<Cache::kStream>(to + j * kMaxThreads * kVectorBytes, value[j]);
    }
    if (block_index().x == 0 && thread_index() < p.tail) {
      const int64_t i = p.vectors * kVectorBytes + thread_index();
      store_one(p.dst + i, load_one(p.src + i));
    }
  }
};

}  // namespace sw
