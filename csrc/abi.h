// The plain C interface of libstackwise_cuda: what every exported function has in common.
//
// Pointers are device pointers, sizes are 64-bit, `stream` is a cudaStream_t. A function returns 0
// or a cudaError_t value, launches on the stream it is given and never synchronises.
// kernels/_cuda.py binds the functions and refuses a library whose version differs from its own:
// raise SW_ABI_VERSION there and here together whenever a signature changes.
#pragma once

#include <stdint.h>

#define SW_ABI_VERSION 2
#define SW_EXPORT extern "C" __attribute__((visibility("default")))
