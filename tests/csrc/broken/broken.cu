// Runs one of the kernels beside this file, by name, broken or right.
#include <string.h>

#include "abi.h"
#include "global_memory.cuh"
#include "shared_memory.cuh"
#include "waiting.cuh"

namespace sw::broken {
namespace {

template <typename Kernel>
int run(const Params& params) {
  return launch<Kernel>({{unsigned(Kernel::kBlocks)}, kThreads, Kernel::kSharedBytes}, params,
                        nullptr);
}

// The first kernel of the name, or -1.
template <template <bool> class... Kernels>
int run_named(const char* name, bool broken, const Params& params) {
  int error = -1;
  const bool found = ((strcmp(Kernels<true>::kName, name) == 0 &&
                       (error = broken ? run<Kernels<true>>(params) : run<Kernels<false>>(params),
                        true)) ||
                      ...);
  return found ? error : -1;
}

}  // namespace
}  // namespace sw::broken

// x and y (n) float32; 0, an error code, or -1 when there is no kernel of this name.
SW_EXPORT int sw_test_run(const char* name, int broken, const float* x, float* y, int n) {
  using namespace sw::broken;
  return run_named<MissingBarrier, TileReused, ShuffleIsNoBarrier, UnwrittenTile,
                   OutsideSharedArray, TooLittleShared, SharedSumWithoutAtomic, BarrierNotReached,
                   DivergentBarrier, NamedBarrierCount, ShuffleOfHalfAWarp, DivergentShuffle,
                   WrongParity, ParityOfThePhaseBefore, LateInitialisation, ReadOutOfBounds,
                   WriteOutOfBounds, WriteToInput, MisalignedVector, WriteRace, BlockReadsAnother>(
      name, broken != 0, {{x}, {y}, n});
}

SW_EXPORT const char* sw_test_error(int error) { return sw::error_text(error); }
