// The functions of the library: each call goes to the variant for this processor.

#include "nearest.h"

#include <cstring>

PatchcacheAssign assign_portable, assign_avx2, assign_avx512;

namespace {

struct Variant {
    const char* name;
    PatchcacheAssign* assign;
    bool runs_here;
};

bool has_avx2() {
#ifdef PATCHCACHE_X86
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return false;
#endif
}

bool has_avx512() {
#ifdef PATCHCACHE_X86
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
    return false;
#endif
}

// The fastest first.
const Variant variants[] = {
#ifdef PATCHCACHE_X86
    {"avx512", assign_avx512, has_avx512()},
    {"avx2", assign_avx2, has_avx2()},
#endif
    {"portable", assign_portable, true},
};

const Variant* choose(const char* name) {
    for (const Variant& variant : variants)
        if (variant.runs_here && (!name || !std::strcmp(name, variant.name))) return &variant;
    return nullptr;
}

const Variant* chosen = choose(nullptr);

}  // namespace

#define PATCHCACHE_PUBLIC extern "C" __attribute__((visibility("default")))

PATCHCACHE_PUBLIC int64_t patchcache_version() { return PATCHCACHE_VERSION; }

PATCHCACHE_PUBLIC const char* patchcache_variant() { return chosen->name; }

// Returns whether this processor has the variant; null takes the fastest that it has.
PATCHCACHE_PUBLIC int64_t patchcache_choose(const char* name) {
    const Variant* found = choose(name);
    if (found) chosen = found;
    return found != nullptr;
}

PATCHCACHE_PUBLIC int64_t patchcache_assign(const PatchcacheIndex* index, const void* x, int64_t n,
                                            int64_t k, const int64_t* hints, int64_t* ids,
                                            void* distances) {
    return chosen->assign(index, x, n, k, hints, ids, distances);
}
