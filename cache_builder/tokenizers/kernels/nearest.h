// What Python and the compiled kernel agree on; `kernels/library.py` mirrors it.

#pragma once

#include <cstdint>

#define PATCHCACHE_VERSION 2  // of what follows

enum { PATCHCACHE_UINT8 = 0, PATCHCACHE_INT16 = 1, PATCHCACHE_FLOAT32 = 2 };

struct PatchcacheIndex {
    int64_t type;             // of centroids and rows, one of the above
    int64_t dim;              // D
    int64_t prefix;           // p
    int64_t num_groups;       // of 64 centroids
    double skew;              // how far the basis is from orthonormal
    const float* mean;        // (D,)
    const float* basis;       // (ceil(p / 64), D, 64), zero beyond p
    const float* panels;      // (num_groups, p + 2, 64): -2 pc, -2 rc, |c - m|^2
    const int64_t* order;     // (num_groups * 64,) centroid of each column, -1 for none
    const void* centroids;    // (K, D)
};

// Writes the k nearest of every row, nearest first: ids (n, k) and squared distances (n, k), int64
// or, for float32, double. `hints` (n,) are likely ids, or null; they are of use for k = 1. Ids are -1
// where a row is not finite or too long for float32. Returns the number of distances measured.
typedef int64_t PatchcacheAssign(const PatchcacheIndex* index, const void* x, int64_t n, int64_t k,
                                 const int64_t* hints, int64_t* ids, void* distances);
