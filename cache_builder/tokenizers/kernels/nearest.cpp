// Exact nearest centroid by a lower bound on a prefix of rotated dimensions.
//
// For an orthonormal basis U (D, p) and a mean m, Pythagoras and the reverse triangle inequality
// give  |x - c|^2 >= |px - pc|^2 + (rx - rc)^2,  px = U^T (x - m), rx = the norm of what U leaves
// out of x - m. One product of p + 2 terms per centroid bounds its distance; the few centroids
// whose bound does not exceed the distance of the best one are measured exactly: in integers, or
// in float64. U decides the speed, never the answer.
//
// Rounding. Let e be the error of the computed px and s the error of rx. For the true nearest
// centroid both |px - pc| and |rx - rc| are at most sqrt(best), so its computed bound exceeds the
// true one by at most 2 sqrt(best) (e + s) + (e + s)^2 and the rounding of the product. `Margin`
// adds them up; with it the true nearest centroid is always measured.
//
// Compiled once per instruction set (PATCHCACHE_LANES floats per vector, PATCHCACHE_VARIANT).

#include "nearest.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

namespace {

constexpr int kLanes = PATCHCACHE_LANES;
constexpr int kGroup = 64;                                 // centroids per panel
constexpr int kVectors = kLanes == 16 ? 4 : 2;             // vectors per step of the product
constexpr int kColumns = kLanes * kVectors;
constexpr int kRows = 6;                                   // kRows * kVectors accumulators
constexpr int kRowsPerBlock = 4 * kRows;                   // share a panel while it is in L1
constexpr int kTermsPerSum = 64;                           // shorter sums round less

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));
typedef int Mask __attribute__((vector_size(kLanes * sizeof(int)), aligned(4)));

constexpr double kUlp = 1.0 / (1 << 24);
constexpr double kLongest = 1e37;  // |x - m|^2, so that no product of two such vectors overflows

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }

// out (kRows, kColumns; out_stride) += rows (kRows, terms; row_stride) @ panel (terms, kGroup)
template <bool kAdd>
inline void multiply(const float* rows, int64_t row_stride, const float* panel, int64_t terms,
                     float* out, int64_t out_stride) {
    Vector sum[kRows][kVectors];
    for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) sum[r][v] = Vector{};
    for (int64_t k = 0; k < terms; ++k) {
        Vector column[kVectors];
        for (int v = 0; v < kVectors; ++v) column[v] = load(panel + k * kGroup + v * kLanes);
        for (int r = 0; r < kRows; ++r)
            for (int v = 0; v < kVectors; ++v) sum[r][v] += rows[r * row_stride + k] * column[v];
    }
    for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) {
            float* to = out + r * out_stride + v * kLanes;
            store(to, kAdd ? load(to) + sum[r][v] : sum[r][v]);
        }
}

template <bool kAdd>
inline void multiply_group(const float* rows, int64_t row_stride, const float* panel,
                           int64_t terms, float* out, int64_t out_stride) {
    for (int column = 0; column < kGroup; column += kColumns)
        multiply<kAdd>(rows, row_stride, panel + column, terms, out + column, out_stride);
}

inline double squared_distance(const float* x, const float* c, int64_t dim) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < dim; ++i) {
        const double difference = static_cast<double>(x[i]) - static_cast<double>(c[i]);
        sum += difference * difference;
    }
    return sum;
}

inline int64_t squared_distance(const int16_t* x, const int16_t* c, int64_t dim) {
    int64_t sum = 0;
    for (int64_t i = 0; i < dim; ++i) {
        const int32_t difference = static_cast<int32_t>(x[i]) - c[i];
        sum += static_cast<int64_t>(difference) * difference;
    }
    return sum;
}

inline int64_t squared_distance(const uint8_t* x, const uint8_t* c, int64_t dim) {
    int64_t total = 0;
    for (int64_t start = 0; start < dim; start += 16384) {  // 2^14 * 255^2 < 2^31
        const int64_t stop = start + 16384 < dim ? start + 16384 : dim;
        int32_t sum = 0;
        for (int64_t i = start; i < stop; ++i) {
            const int16_t difference = static_cast<int16_t>(x[i] - c[i]);
            sum += difference * difference;
        }
        total += sum;
    }
    return total;
}

template <typename Value> struct DistanceOf { typedef int64_t type; };
template <> struct DistanceOf<float> { typedef double type; };

class Margin {
  public:
    explicit Margin(const PatchcacheIndex& index)
        : sum_((kTermsPerSum + index.dim / kTermsPerSum + 4) * kUlp *
               std::sqrt(static_cast<double>(index.prefix))),
          norm_((index.dim / kLanes + 8) * kUlp),
          skew_(index.skew),
          product_((index.prefix + 6) * 2 * kUlp) {}

    // The largest computed bound, less |x - m|^2, that the nearest centroid can have.
    float threshold(double best, double norm2, double residual) const {
        const double norm = std::sqrt(norm2), distance = std::sqrt(best);
        const double reach = 2 * norm + distance;  // |x - m| + |c - m|
        const double e = sum_ * norm + (skew_ + 4 * kUlp) * reach;
        const double error2 = 2 * e * norm + e * e + norm_ * norm2;  // of the squared residual
        const double s = std::min(std::sqrt(error2), residual > 0 ? error2 / residual : DBL_MAX);
        const double slack = 2 * distance * (e + s) + (e + s) * (e + s) +
                             product_ * reach * reach + 2 * norm_ * norm2 + FLT_MIN;
        const double bound = best - norm2 + slack;
        return static_cast<float>(bound + 2 * kUlp * std::fabs(bound));
    }

  private:
    double sum_, norm_, skew_, product_;
};

template <typename Value>
class Assignment {
    typedef typename DistanceOf<Value>::type Distance;

  public:
    Assignment(const PatchcacheIndex& index)
        : index_(index),
          margin_(index),
          width_(index.num_groups * kGroup),
          basis_columns_((index.prefix + kGroup - 1) / kGroup * kGroup),
          terms_(index.prefix + 2),
          centred_(kRowsPerBlock * index.dim),
          projected_(kRowsPerBlock * basis_columns_),
          query_(kRowsPerBlock * terms_),
          bounds_(kRowsPerBlock * width_) {}

    int64_t run(const Value* x, int64_t n, int64_t k, const int64_t* hints, int64_t* ids,
                Distance* distances) {
        evaluations_ = 0;
        nearest_.resize(k);
        first_.resize(k);
        for (int64_t start = 0; start < n; start += kRowsPerBlock) {
            const int count = static_cast<int>(std::min<int64_t>(kRowsPerBlock, n - start));
            project(x + start * index_.dim, count);
            bound(count);
            for (int r = 0; r < count; ++r) {
                const int64_t row = start + r;
                if (!(norms2_[r] < kLongest))  // not a number, or too long for float32
                    std::fill_n(ids + row * k, k, -1);
                else if (k == 1)
                    decide(r, x + row * index_.dim, hints ? hints[row] : -1, ids + row,
                           distances + row);
                else
                    rank(r, x + row * index_.dim, ids + row * k, distances + row * k);
            }
        }
        return evaluations_;
    }

  private:
    void project(const Value* x, int count) {
        const int64_t dim = index_.dim;
        for (int r = 0; r < kRowsPerBlock; ++r) {
            float* row = &centred_[r * dim];
            if (r >= count) {
                std::memset(row, 0, dim * sizeof(float));
                continue;
            }
            const Value* from = x + r * dim;
            float sum = 0;
            for (int64_t i = 0; i < dim; ++i) row[i] = static_cast<float>(from[i]) - index_.mean[i];
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < dim; ++i) sum += row[i] * row[i];
            norms2_[r] = sum;
        }
        std::memset(projected_.data(), 0, projected_.size() * sizeof(float));
        for (int64_t column = 0; column < basis_columns_; column += kGroup)
            for (int64_t k = 0; k < dim; k += kTermsPerSum)
                for (int r = 0; r < kRowsPerBlock && r < count; r += kRows)
                    multiply_group<true>(&centred_[r * dim + k], dim,
                                         index_.basis + column * dim + k * kGroup,
                                         std::min<int64_t>(kTermsPerSum, dim - k),
                                         &projected_[r * basis_columns_ + column], basis_columns_);
        for (int r = 0; r < count; ++r) {
            const float* row = &projected_[r * basis_columns_];
            double kept2 = 0;
#pragma omp simd reduction(+ : kept2)
            for (int64_t i = 0; i < index_.prefix; ++i)
                kept2 += static_cast<double>(row[i]) * row[i];
            residuals_[r] = std::sqrt(std::max(0.0, norms2_[r] - kept2));
            float* query = &query_[r * terms_];
            std::memcpy(query, row, index_.prefix * sizeof(float));
            query[index_.prefix] = static_cast<float>(residuals_[r]);
            query[index_.prefix + 1] = 1;
        }
    }

    void bound(int count) {
        for (int64_t group = 0; group < index_.num_groups; ++group) {
            const float* panel = index_.panels + group * terms_ * kGroup;
            for (int r = 0; r < count; r += kRows)
                multiply_group<false>(&query_[r * terms_], terms_, panel, terms_,
                                      &bounds_[r * width_ + group * kGroup], width_);
        }
    }

    void decide(int r, const Value* x, int64_t hint, int64_t* id, Distance* distance) {
        const float* bounds = &bounds_[r * width_];
        if (hint < 0) hint = index_.order[smallest(bounds)];
        Distance best = measure(x, hint);
        int64_t nearest = hint;
        float threshold = margin_.threshold(static_cast<double>(best), norms2_[r], residuals_[r]);
        for (int64_t j = 0; j < width_; j += kColumns) {
            if (none_below(bounds + j, threshold)) continue;
            for (int64_t i = j; i < j + kColumns; ++i) {
                const int64_t candidate = index_.order[i];
                if (!(bounds[i] <= threshold) || candidate < 0 || candidate == hint) continue;
                const Distance found = measure(x, candidate);
                if (found < best) {
                    best = found;
                    nearest = candidate;
                    threshold =
                        margin_.threshold(static_cast<double>(best), norms2_[r], residuals_[r]);
                } else if (found == best && candidate < nearest) {
                    nearest = candidate;
                }
            }
        }
        *id = nearest;
        *distance = best;
    }

    // The k nearest: those with the smallest bounds give a limit, and every centroid whose bound
    // does not exceed it is measured.
    void rank(int r, const Value* x, int64_t* ids, Distance* distances) {
        const float* bounds = &bounds_[r * width_];
        const size_t k = nearest_.size();
        smallest(bounds, first_);
        for (size_t i = 0; i < k; ++i) {
            const int64_t candidate = index_.order[first_[i].second];
            nearest_[i] = {measure(x, candidate), candidate};
        }
        std::sort(nearest_.begin(), nearest_.end());
        const auto limit = [&] {
            return margin_.threshold(static_cast<double>(nearest_[k - 1].first), norms2_[r],
                                     residuals_[r]);
        };
        const std::pair<float, int64_t> last = first_[k - 1];
        float threshold = limit();
        for (int64_t j = 0; j < width_; j += kColumns) {
            if (none_below(bounds + j, threshold)) continue;
            for (int64_t i = j; i < j + kColumns; ++i) {
                const int64_t candidate = index_.order[i];
                const bool measured = std::make_pair(bounds[i], i) <= last;
                if (!(bounds[i] <= threshold) || candidate < 0 || measured) continue;
                const std::pair<Distance, int64_t> found{measure(x, candidate), candidate};
                if (!(found < nearest_[k - 1])) continue;
                insert(nearest_, found);
                threshold = limit();
            }
        }
        for (size_t i = 0; i < k; ++i) {
            distances[i] = nearest_[i].first;
            ids[i] = nearest_[i].second;
        }
    }

    // The columns with the smallest bounds, in order of bound and column.
    void smallest(const float* bounds, std::vector<std::pair<float, int64_t>>& found) const {
        std::fill(found.begin(), found.end(), std::make_pair(FLT_MAX, width_));
        for (int64_t j = 0; j < width_; j += kColumns) {
            if (none_below(bounds + j, found.back().first)) continue;
            for (int64_t i = j; i < j + kColumns; ++i)
                if (index_.order[i] >= 0 && std::make_pair(bounds[i], i) < found.back())
                    insert(found, std::make_pair(bounds[i], i));
        }
    }

    // Put a value where it belongs in a sorted list; the last one leaves it.
    template <typename Pair> static void insert(std::vector<Pair>& sorted, const Pair& value) {
        size_t i = sorted.size() - 1;
        for (; i > 0 && value < sorted[i - 1]; --i) sorted[i] = sorted[i - 1];
        sorted[i] = value;
    }

    static bool none_below(const float* bounds, float threshold) {
        Mask below = Mask{};
        for (int v = 0; v < kVectors; ++v) below |= load(bounds + v * kLanes) <= threshold;
        return !any(below);
    }

    int64_t smallest(const float* bounds) const {
        Vector least = load(bounds);
        for (int64_t j = kLanes; j < width_; j += kLanes) {
            const Vector other = load(bounds + j);
            least = other < least ? other : least;
        }
        float value = least[0];
        for (int lane = 1; lane < kLanes; ++lane) value = std::min(value, least[lane]);
        for (int64_t j = 0; j < width_; j += kLanes) {
            if (!any(load(bounds + j) == value)) continue;
            for (int64_t i = j; i < j + kLanes; ++i)
                if (bounds[i] == value && index_.order[i] >= 0) return i;
        }
        return 0;  // order[0] is a centroid
    }

    static bool any(Mask mask) {
        typedef long long Long;
        Long parts[sizeof(Mask) / sizeof(Long)], all = 0;
        std::memcpy(parts, &mask, sizeof(Mask));
        for (Long part : parts) all |= part;
        return all != 0;
    }

    Distance measure(const Value* x, int64_t centroid) {
        ++evaluations_;
        return squared_distance(
            x, static_cast<const Value*>(index_.centroids) + centroid * index_.dim, index_.dim);
    }

    const PatchcacheIndex& index_;
    const Margin margin_;
    const int64_t width_, basis_columns_, terms_;
    std::vector<float> centred_, projected_, query_, bounds_;
    std::vector<std::pair<float, int64_t>> first_;       // bound and column
    std::vector<std::pair<Distance, int64_t>> nearest_;  // distance and centroid
    double norms2_[kRowsPerBlock], residuals_[kRowsPerBlock];
    int64_t evaluations_ = 0;
};

template <typename Value>
int64_t assign(const PatchcacheIndex& index, const void* x, int64_t n, int64_t k,
               const int64_t* hints, int64_t* ids, void* distances) {
    typedef typename DistanceOf<Value>::type Distance;
    return Assignment<Value>(index).run(static_cast<const Value*>(x), n, k, hints, ids,
                                        static_cast<Distance*>(distances));
}

}  // namespace

int64_t PATCHCACHE_VARIANT(const PatchcacheIndex* index, const void* x, int64_t n, int64_t k,
                           const int64_t* hints, int64_t* ids, void* distances) {
    switch (index->type) {
        case PATCHCACHE_UINT8: return assign<uint8_t>(*index, x, n, k, hints, ids, distances);
        case PATCHCACHE_INT16: return assign<int16_t>(*index, x, n, k, hints, ids, distances);
        default: return assign<float>(*index, x, n, k, hints, ids, distances);
    }
}
