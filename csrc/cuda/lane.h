// What the headers need that nvcc compiles into kernels and g++ into the tests that emulate them (tests/cuda).
#pragma once

#ifdef __CUDACC__
#define RK_LANE __device__ __forceinline__
#define RK_UNROLL _Pragma("unroll")
#define RK_ROLLED _Pragma("unroll 1")
#else
#define RK_LANE inline
#define RK_UNROLL
#define RK_ROLLED
#endif
