// The primitive layer for a CPU; see prims.h. Values here, checks in emulator.h.
#pragma once

#include <cmath>
#include <cstring>

#include "emu/emulator.h"

namespace sw {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// The values of cudaError_t that host entries return, and one of the emulator's own.
constexpr int kSuccess = 0;
constexpr int kInvalidValue = 1;
constexpr int kMisalignedAddress = 716;

inline const char* error_text(int error) {
  if (error == emu::kFault) return emu::last_fault();
  if (error == kInvalidValue) return "invalid argument";
  return error == kMisalignedAddress ? "misaligned address" : "unknown error";
}

inline int multiprocessors(int& count) {
  count = 2;
  return kSuccess;
}

template <typename Kernel>
int launch(const Launch& at, const typename Kernel::Params& params, void* stream) {
  (void)stream;
  const emu::Grid grid{Kernel::kName,          {at.blocks.x, at.blocks.y, at.blocks.z},
                       at.threads,             Kernel::kMaxThreads,
                       size_t(at.shared_bytes)};
  return emu::launch(
      grid,
      [](const void* p) { Kernel::run(*static_cast<const typename Kernel::Params*>(p)); },
      &params);
}

inline Dim3 block_index() {
  const unsigned* i = emu::block_index();
  return {i[0], i[1], i[2]};
}
inline Dim3 block_count() {
  const unsigned* n = emu::block_count();
  return {n[0], n[1], n[2]};
}
inline int thread_index() { return emu::thread_index(); }
inline int thread_count() { return emu::thread_count(); }

template <int N, Cache kCache = Cache::kDefault, typename T>
Vector<T, N> load(Global<const T> from) {
  using V = Vector<T, N>;
  V value;
  emu::global_access(from.address, sizeof(V), alignof(V), emu::Access::kRead);
  std::memcpy(&value, from.address, sizeof(V));
  return value;
}

template <Cache kCache = Cache::kDefault, typename T, int N>
void store(Global<T> to, const Vector<T, N>& value) {
  using V = Vector<T, N>;
  emu::global_access(to.address, sizeof(V), alignof(V), emu::Access::kWrite);
  std::memcpy(to.address, &value, sizeof(V));
}

inline void atomic_add(Global<float> to, float value) {
  emu::global_access(to.address, sizeof(float), sizeof(float), emu::Access::kAtomic);
  *to.address += value;
}

template <typename S>
S& shared_memory() {
  return *static_cast<S*>(emu::shared_memory());
}

template <typename T, int kSize>
void check_element(const SharedArray<T, kSize>& array, int64_t index, int64_t count) {
  if (index < 0 || index + count > kSize)
    emu::outside_array(&array, index, count, kSize, int(sizeof(T)));
}

template <int N, typename T, int kSize>
Vector<T, N> load_shared(const SharedArray<T, kSize>& from, int index) {
  using V = Vector<T, N>;
  check_element(from, index, N);
  V value;
  emu::shared_access(from.data + index, sizeof(V), alignof(V), emu::Access::kRead);
  std::memcpy(&value, from.data + index, sizeof(V));
  return value;
}

template <typename T, int N, int kSize>
void store_shared(SharedArray<T, kSize>& to, int index, const Vector<T, N>& value) {
  using V = Vector<T, N>;
  check_element(to, index, N);
  emu::shared_access(to.data + index, sizeof(V), alignof(V), emu::Access::kWrite);
  std::memcpy(to.data + index, &value, sizeof(V));
}

template <int kSize>
void atomic_add(SharedArray<float, kSize>& to, int index, float value) {
  check_element(to, index, 1);
  emu::shared_access(to.data + index, sizeof(float), sizeof(float), emu::Access::kAtomic);
  to.data[index] += value;
}

template <typename T>
T shuffle(emu::Shuffle kind, T value, int operand) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "one register, or two");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = emu::shuffle(kind, bits, operand);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename T>
T shuffle_xor(T value, int mask) {
  return shuffle(emu::Shuffle::kXor, value, mask);
}

template <typename T>
T shuffle_down(T value, int delta) {
  return shuffle(emu::Shuffle::kDown, value, delta);
}

inline void block_barrier(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emu::block_barrier(file, line);
}
inline void warp_barrier() { emu::warp_barrier(); }
inline void named_barrier(int id, int threads) { emu::named_barrier(id, threads); }

inline void mbarrier_init(MBarrier& barrier, int arrivals) {
  emu::mbarrier_init(&barrier, arrivals);
}
inline void mbarrier_arrive(MBarrier& barrier) { emu::mbarrier_arrive(&barrier); }
inline void mbarrier_wait(MBarrier& barrier, int parity) { emu::mbarrier_wait(&barrier, parity); }

inline float to_float(float value) { return value; }

inline float to_float(bfloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

inline float to_float(float16 value) {
  const int sign = value.bits >> 15, exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
  float magnitude = std::ldexp(float(fraction), -24);
  if (exponent == 31) magnitude = fraction ? NAN : INFINITY;
  if (exponent > 0 && exponent < 31) magnitude = std::ldexp(float(fraction + 1024), exponent - 25);
  return sign ? -magnitude : magnitude;
}

template <typename T>
T from_float(float value);

template <>
inline float from_float<float>(float value) {
  return value;
}

template <>
inline bfloat16 from_float<bfloat16>(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (std::isnan(value)) return {uint16_t(bits >> 16 | 0x40)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <>
inline float16 from_float<float16>(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return {uint16_t(sign | 0x7e00)};
  if (magnitude >= 65520.0f) return {uint16_t(sign | 0x7c00)};
  // The spacing of float16 at this size; nearbyint rounds to nearest even.
  const int exponent = magnitude < 0x1p-14f ? -14 : std::ilogb(magnitude);
  const int steps = int(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  // `steps` counts from zero in subnormals; rounded up to 2048 it carries into the exponent.
  return {uint16_t(sign | (((exponent + 14) << 10) + steps))};
}

inline float reciprocal_sqrt(float value) { return 1.0f / std::sqrt(value); }

}  // namespace sw
