// SPDX-License-Identifier: Apache-2.0
// The kernels by what they are launched for: launchers start them by these tables.
//
// Included at the end of the one file that defines them, for a device or, in the tests, for a host.
#pragma once

#include "cuda/launch.h"

namespace fastdiff::cuda {

#define FASTDIFF_OUT_DTYPES(kernel, T, threads)                                \
    {                                                                          \
        {reinterpret_cast<const void*>(kernel<T, float>), threads, {}},        \
            {reinterpret_cast<const void*>(kernel<T, double>), threads, {}},   \
            {reinterpret_cast<const void*>(kernel<T, Bfloat16>), threads, {}}, \
            {reinterpret_cast<const void*>(kernel<T, Float16>), threads, {}},  \
    }

Kernel kStages[2][2][2][kDtypes] = {
    {{FASTDIFF_OUT_DTYPES(stage_shared, Row<float>, kThreads),
      FASTDIFF_OUT_DTYPES(stage_shared, Row<double>, kThreads)},
     {FASTDIFF_OUT_DTYPES(stage_samples, Row<float>, kThreads),
      FASTDIFF_OUT_DTYPES(stage_samples, Row<double>, kThreads)}},
    {{FASTDIFF_OUT_DTYPES(stage_shared, GrownRow<float>, kThreads),
      FASTDIFF_OUT_DTYPES(stage_shared, GrownRow<double>, kThreads)},
     {FASTDIFF_OUT_DTYPES(stage_samples, GrownRow<float>, kThreads),
      FASTDIFF_OUT_DTYPES(stage_samples, GrownRow<double>, kThreads)}},
};
Kernel kThresholds[2][2][kDtypes] = {
    {FASTDIFF_OUT_DTYPES(thresholds, Row<float>, kSelectors<float>),
     FASTDIFF_OUT_DTYPES(thresholds, Row<double>, kSelectors<double>)},
    {FASTDIFF_OUT_DTYPES(thresholds, GrownRow<float>, kSelectors<float>),
     FASTDIFF_OUT_DTYPES(thresholds, GrownRow<double>, kSelectors<double>)},
};
Kernel kMeasures[2][kDtypes] = {FASTDIFF_OUT_DTYPES(measures, float, kThreads),
                                FASTDIFF_OUT_DTYPES(measures, double, kThreads)};
Kernel kNormals[2] = {{reinterpret_cast<const void*>(normals<float>), kThreads, {}},
                      {reinterpret_cast<const void*>(normals<double>), kThreads, {}}};
#undef FASTDIFF_OUT_DTYPES

}  // namespace fastdiff::cuda
