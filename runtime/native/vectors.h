// Vectors of the compiler's own kind, as wide as the level's registers. GCC and Clang translate them for every CPU.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include <arm_neon.h>
#endif

// Everything of a level lies in a namespace of its own, so that the linker never takes the code of another level.
namespace internvl_edge::INTERNVL_EDGE_LEVEL {

#if defined(__AVX512F__)
constexpr int W = 16;  // lanes of 32 bits
constexpr int REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int W = 8;
constexpr int REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int W = 4;
constexpr int REGISTERS = 32;
#else
constexpr int W = 4;
constexpr int REGISTERS = 16;
#endif

typedef float Floats __attribute__((vector_size(4 * W)));
typedef int32_t Ints __attribute__((vector_size(4 * W)));
typedef uint32_t Words __attribute__((vector_size(4 * W)));

inline Floats splat(float x) { return x - Floats{}; }  // minus, because plus would turn -0 into 0
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

template <class Vector, class T>
inline Vector load(const T* from) {
    Vector x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

template <class Vector, class T>
inline void store(T* to, Vector x) {
    std::memcpy(to, &x, sizeof x);
}

#if defined(__clang__)
#define INTERNVL_EDGE_PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define INTERNVL_EDGE_PICK(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif

// Lanes 0, 2, 4 ... of a and then of b, or lanes 1, 3, 5 ...
template <int FIRST, class Vector, size_t... I>
inline Vector every_second(Vector a, Vector b, std::index_sequence<I...>) {
    return INTERNVL_EDGE_PICK(a, b, int(2 * I + FIRST)...);
}

// a[first], b[first], a[first + 1], b[first + 1] ...
template <int FIRST, class Vector, size_t... I>
inline Vector interleave(Vector a, Vector b, std::index_sequence<I...>) {
    return INTERNVL_EDGE_PICK(a, b, int(FIRST + I / 2 + (I % 2) * W)...);
}

template <int BY, class Vector, size_t... I>
inline Vector rotate(Vector a, std::index_sequence<I...>) {
    return INTERNVL_EDGE_PICK(a, a, int((I + BY) % W)...);
}

using Lanes = std::make_index_sequence<W>;

// Lane j of the result is the sum of the lanes of rows[j].
inline Floats sums(Floats (&rows)[W]) {
    for (int count = W; count > 1; count /= 2)
        for (int i = 0; i < count / 2; ++i)
            rows[i] = every_second<0>(rows[2 * i], rows[2 * i + 1], Lanes{}) +
                      every_second<1>(rows[2 * i], rows[2 * i + 1], Lanes{});
    return rows[0];
}

template <class Vector>
inline void transpose(Vector (&rows)[W]) {
    for (int round = 1; round < W; round *= 2) {
        Vector next[W];
        for (int i = 0; i < W / 2; ++i) {
            next[2 * i] = interleave<0>(rows[i], rows[i + W / 2], Lanes{});
            next[2 * i + 1] = interleave<W / 2>(rows[i], rows[i + W / 2], Lanes{});
        }
        std::memcpy(rows, next, sizeof next);
    }
}

template <int BY = W / 2>
inline float largest(Floats x) {
    if constexpr (BY == 0)
        return x[0];
    else
        return largest<BY / 2>(larger(x, rotate<BY>(x, Lanes{})));
}

template <int BY = W / 2>
inline float sum(Floats x) {
    if constexpr (BY == 0)
        return x[0];
    else
        return sum<BY / 2>(x + rotate<BY>(x, Lanes{}));
}

// 2^x for x <= 0, to 2 ulp; below -126 it is 2^-126 instead of less. The polynomial interpolates 2^x at the Chebyshev
// points of [-1/2, 1/2] (relative error 3e-9) and is 1 at 0.
inline Floats power_of_2(Floats x) {
    const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    x = larger(x, splat(-126.0f));
    const Floats shifted = x + magic;
    const Floats r = x - (shifted - magic);
    Floats y = splat(1.54614449e-4f) * r + 1.3400428e-3f;
    y = y * r + 9.61805694e-3f;
    y = y * r + 5.55032715e-2f;
    y = y * r + 0.240226507f;
    y = y * r + 0.693147182f;
    y = y * r + 1.0f;
    Ints bits, exponent;
    std::memcpy(&bits, &y, sizeof y);
    std::memcpy(&exponent, &shifted, sizeof shifted);
    bits += exponent << 23;  // the integer stands in the lowest bits of `shifted`
    std::memcpy(&y, &bits, sizeof y);
    return y;
}

// What matrices are multiplied in. A unit of 32 bits holds DEPTH neighbors along the summed axis.
struct Float32 {
    static constexpr int DEPTH = 1;
    using Unit = float;
    using Vector = Floats;
    static Vector broadcast(Unit unit) { return splat(unit); }
    static Floats add_product(Floats sum, Vector a, Vector b) { return sum + a * b; }
    // Units of W * DEPTH neighbors.
    static Vector along(const Floats (&x)[DEPTH]) { return x[0]; }
    // Units that hold a lane of each of DEPTH rows.
    static Vector across(const Floats (&rows)[DEPTH]) { return rows[0]; }
};

#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define INTERNVL_EDGE_BFLOAT16 1

// Two bfloat16 in each unit, the first in the lower half; products are exact, sums float32.
struct Bfloat16 {
    static constexpr int DEPTH = 2;
    using Unit = uint32_t;
    using Vector = Words;
    static Vector broadcast(Unit unit) { return unit | Words{}; }
    static Floats add_product(Floats sum, Vector a, Vector b) {
#if defined(__AVX512BF16__)
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
        return (Floats)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)a, (bfloat16x8_t)b);
#endif
    }
    static Vector along(const Floats (&x)[DEPTH]) {
#if defined(__AVX512BF16__)
        return (Vector)_mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]);
#else
        return across({every_second<0>(x[0], x[1], Lanes{}), every_second<1>(x[0], x[1], Lanes{})});
#endif
    }
    static Vector across(const Floats (&rows)[DEPTH]) {
        return (rounded(rows[0]) >> 16) | (rounded(rows[1]) & 0xffff0000u);
    }

private:
    // Round to the nearest, ties to even. Keys, values, queries and probabilities are finite.
    static Words rounded(Floats x) {
        Words bits;
        std::memcpy(&bits, &x, sizeof x);
        return bits + 0x7fffu + ((bits >> 16) & 1u);
    }
};
#endif

}  // namespace internvl_edge::INTERNVL_EDGE_LEVEL
