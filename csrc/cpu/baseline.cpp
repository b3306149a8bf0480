// SPDX-License-Identifier: Apache-2.0
// The kernels for any machine, and the choice among instruction sets at run time.
#define FASTDIFF_ISA baseline
#define FASTDIFF_LANES 4
#include "cpu/kernels.h"

namespace fastdiff::cpu {

extern const Kernels kBaseline = baseline::kKernels;

namespace {

const Kernels*& chosen() {
    static const Kernels* kernels = nullptr;
    if (kernels == nullptr) {
        const Kernels* list[3];
        available(list);
        kernels = list[0];
    }
    return kernels;
}

}  // namespace

int available(const Kernels* list[3]) {
    int count = 0;
#if defined(FASTDIFF_X86)
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
    const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    if (v3 && v4) list[count++] = &kAvx512;
    if (v3) list[count++] = &kAvx2;
#endif
    list[count++] = &kBaseline;
    return count;
}

const Kernels& active() { return *chosen(); }

bool select(const char* name) {
    const Kernels* list[3];
    const int count = available(list);
    for (int k = 0; k < count; ++k) {
        if (strcmp(list[k]->name, name) == 0) {
            chosen() = list[k];
            return true;
        }
    }
    return false;
}

}  // namespace fastdiff::cpu
