// The emulator's conversions between float and its 16-bit types, for comparison with PyTorch's.
#include "abi.h"
#include "prims.h"

namespace {

template <typename T>
void round_all(const float* from, uint16_t* to, int n) {
  for (int i = 0; i < n; ++i) to[i] = sw::from_float<T>(from[i]).bits;
}

template <typename T>
void widen_all(const uint16_t* from, float* to, int n) {
  for (int i = 0; i < n; ++i) to[i] = sw::to_float(T{from[i]});
}

}  // namespace

SW_EXPORT void sw_test_round(int half, const float* from, uint16_t* to, int n) {
  half ? round_all<sw::float16>(from, to, n) : round_all<sw::bfloat16>(from, to, n);
}

SW_EXPORT void sw_test_widen(int half, const uint16_t* from, float* to, int n) {
  half ? widen_all<sw::float16>(from, to, n) : widen_all<sw::bfloat16>(from, to, n);
}
