/* A product whose left matrix holds many zeros, which are passed over: what dropout leaves. For an x86-64 CPU with
 * AVX-512; GCC and Clang, called through ctypes; no header of Python or torch.
 *
 * The numbers that are not zero are listed for INNER of the inner dimension at a time, while that part of the right
 * matrix, COLUMNS wide, lies in the fastest cache.
 */
#include <stdlib.h>
#include <string.h>

#include "vectors.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma,bmi,popcnt,avx512f,avx512bw,avx512vl,avx512dq")))
#define INNER 96
#define COLUMNS 64
#define VECTORS (COLUMNS / LANES)
#define LISTS 512 /* at a time */

struct list {
    float values[INNER + LANES]; /* a vector is written where its first number belongs */
    uint16_t at[INNER + LANES];
};

struct space {
    _Alignas(64) float block[INNER * COLUMNS]; /* no vector in it lies across two lines of the cache */
    uint32_t lengths[LISTS];
    struct list lists[LISTS];
};

TARGET INLINE uint32_t not_zero(const float *x, size_t left, __m512 *values) {
    __mmask16 inside = left < LANES ? (1u << left) - 1 : 0xffff;
    *values = _mm512_maskz_loadu_ps(inside, x);
    return _mm512_cmp_ps_mask(*values, _mm512_setzero_ps(), _CMP_NEQ_UQ);
}

TARGET static void list_rows(struct space *s, const float *x, size_t stride, size_t rows, size_t columns) {
    for (size_t r = 0; r < rows; r++, x += stride) {
        __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        struct list *list = s->lists + r;
        uint32_t length = 0;
        for (size_t c = 0; c < columns; c += LANES) {
            __m512 values;
            uint32_t mask = not_zero(x + c, columns - c, &values);
            _mm512_storeu_ps(list->values + length, _mm512_maskz_compress_ps(mask, values));
            __m256i narrow = _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(mask, at));
            _mm256_storeu_si256((__m256i *)(list->at + length), narrow);
            at = _mm512_add_epi32(at, _mm512_set1_epi32(LANES));
            length += __builtin_popcount(mask);
        }
        s->lengths[r] = length;
    }
}

TARGET static void list_columns(struct space *s, const float *x, size_t stride, size_t rows, size_t columns) {
    memset(s->lengths, 0, columns * sizeof *s->lengths);
    for (size_t r = 0; r < rows; r++, x += stride)
        for (size_t c = 0; c < columns; c += LANES) {
            __m512 values;
            for (uint32_t mask = not_zero(x + c, columns - c, &values); mask; mask &= mask - 1) {
                size_t i = c + __builtin_ctz(mask);
                uint32_t length = s->lengths[i]++;
                s->lists[i].values[length] = x[i];
                s->lists[i].at[length] = r;
            }
        }
}

TARGET INLINE void add_list(const struct list *list, uint32_t length, const float *block, const float *start, float *y) {
    lanes sums[VECTORS];
    for (int v = 0; v < VECTORS; v++) sums[v] = start ? AT_CONST(start + v * LANES) : (lanes){0};
    for (uint32_t i = 0; i < length; i++) {
        const float *row = block + (size_t) list->at[i] * COLUMNS;
        float value = list->values[i];
        for (int v = 0; v < VECTORS; v++) sums[v] += value * AT_CONST(row + v * LANES);
    }
    for (int v = 0; v < VECTORS; v++) AT(y + v * LANES) = sums[v];
}

EXPORT int sparse_product_can_run(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
        __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

/* y (outer, width) = x (outer, inner) . b (inner, width) + bias (width), which may be NULL; width a multiple of
 * COLUMNS. Rows of x lie stride apart, or, where x is transposed, its columns do. False if there is no memory. */
EXPORT TARGET int sparse_product(
        const float *x, size_t stride, int transposed, size_t outer, size_t inner, const float *b, const float *bias,
        float *y, size_t width) {
    struct space *s = aligned_alloc(_Alignof(struct space), sizeof *s);
    if (!s) return 0;
    for (size_t o = 0; o < outer; o += LISTS) {
        size_t some = outer - o < LISTS ? outer - o : LISTS;
        size_t i = 0;
        do { /* once even if there is nothing to add */
            size_t depth = inner - i < INNER ? inner - i : INNER;
            if (transposed) list_columns(s, x + i * stride + o, stride, depth, some);
            else list_rows(s, x + o * stride + i, stride, some, depth);
            for (size_t c = 0; c < width; c += COLUMNS) {
                for (size_t k = 0; k < depth; k++)
                    memcpy(s->block + k * COLUMNS, b + (i + k) * width + c, COLUMNS * sizeof *b);
                for (size_t r = 0; r < some; r++) {
                    float *out = y + (o + r) * width + c;
                    const float *start = i ? out : bias ? bias + c : NULL;
                    add_list(s->lists + r, s->lengths[r], s->block, start, out);
                }
            }
        } while ((i += INNER) < inner);
    }
    free(s);
    return 1;
}
#endif
