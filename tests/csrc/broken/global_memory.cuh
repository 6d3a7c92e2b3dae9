// Mistakes with global memory. kBroken makes the mistake.
#pragma once

#include "shared_memory.cuh"

namespace sw::broken {

// y[i] = x[i]. Broken: the last thread goes one element too far.
template <bool kBroken>
struct ReadOutOfBounds : Base<kBroken> {
  static constexpr const char* kName = "read_out_of_bounds";
  SW_DEVICE static void run(const Params& p) {
    const int i = thread_index();
    store_one(p.y + i, load_one(p.x + (kBroken ? i + 1 : i)));
  }
};

template <bool kBroken>
struct WriteOutOfBounds : Base<kBroken> {
  static constexpr const char* kName = "write_out_of_bounds";
  SW_DEVICE static void run(const Params& p) {
    const int i = thread_index();
    store_one(p.y + (kBroken ? i - 1 : i), load_one(p.x + i));
  }
};

// Broken: the result goes where the launch promised only to read.
template <bool kBroken>
struct WriteToInput : Base<kBroken> {
  static constexpr const char* kName = "write_to_input";
  SW_DEVICE static void run(const Params& p) {
    const int i = thread_index();
    const Global<float> to = kBroken ? Global<float>{const_cast<float*>(p.x.address)} : p.y;
    store_one(to + i, load_one(p.x + i));
  }
};

// y = x, four elements at a time, by 16 threads. Broken: the vectors begin at an odd element.
template <bool kBroken>
struct MisalignedVector : Base<kBroken> {
  static constexpr const char* kName = "misaligned_vector";
  SW_DEVICE static void run(const Params& p) {
    const int i = 4 * thread_index();
    if (i + 4 > p.n) return;
    store(p.y + i, load<4>(p.x + (kBroken ? i / 4 : i)));
  }
};

// y[0] = Σ x over two blocks. Broken: each thread stores its own.
template <bool kBroken>
struct WriteRace : Base<kBroken> {
  static constexpr const char* kName = "write_race";
  SW_DEVICE static void run(const Params& p) {
    const float x = load_one(p.x + thread_index());
    if constexpr (kBroken) {
      store_one(p.y, x);
    } else {
      atomic_add(p.y, x);
    }
  }
};

// Two blocks copy half of x each. Broken: the second reads what the first wrote in this launch.
template <bool kBroken>
struct BlockReadsAnother : Base<kBroken> {
  static constexpr const char* kName = "block_reads_another";
  static constexpr int kBlocks = 2;
  SW_DEVICE static void run(const Params& p) {
    const int half = p.n / 2, block = int(block_index().x), i = thread_index();
    if (i >= half) return;
    if (kBroken && block == 1) {
      store_one(p.y + (half + i), load_one(Global<const float>{p.y.address} + i));
    } else {
      store_one(p.y + (block * half + i), load_one(p.x + (block * half + i)));
    }
  }
};

}  // namespace sw::broken
