/* What xnor.c is made of: vectors of floats; and for each kind of processor, packing and sums of products of signs.
 *
 * The paths are portable C, then AVX2 and AVX-512 (both compiled for any x86-64, called where the processor has them),
 * or NEON. The rest is written once, with vectors of GCC and Clang, and compiled for each path.
 */
#include <math.h>
#include <string.h>

#include "vectors.h"

enum { PORTABLE, SIMD, WIDE };

typedef float quarter __attribute__((vector_size(LANES), aligned(4), may_alias));

INLINE float total(const lanes *x) {
    const quarter *q = (const quarter *)x;
    quarter sum = (q[0] + q[1]) + (q[2] + q[3]);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

/* a = the greater of a and b */
INLINE void raise(lanes *a, const lanes *b) {
    ints more = *b > *a;
    *a = (lanes)(((ints)*b & more) | ((ints)*a & ~more));
}

INLINE float mean_abs(const float *x, size_t size) {
    float sums[4] = {0}; /* so that an addition does not wait for the one before */
    for (size_t e = 0; e < size; e++) sums[e % 4] += fabsf(x[e]);
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) / (float)size;
}

/* e^x for x <= 0: 2^n by the bits of the exponent, e^r by a polynomial (that of Cephes' expf) */
INLINE void exp_negative(lanes *x) {
    const lanes least = (lanes){0} - 87.f;
    raise(x, &least);
    ints whole = __builtin_convertvector(*x * 1.44269504f - .5f, ints);
    lanes n = __builtin_convertvector(whole, lanes), r = *x - n * .693359375f + n * 2.12194440e-4f;
    lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    *x = (p * r * r + r + 1.f) * (lanes)((whole + 127) << 23);
}

/* s[j] += softmax(c)[j] u[j], for logits c that have space for a multiple of LANES and are overwritten */
INLINE void attend(float *c, const float *u, float *s, size_t classes, size_t dim) {
    for (size_t j = classes; j % LANES; j++) c[j] = -INFINITY;
    lanes greatest = AT(c), sums = {0};
    for (size_t j = LANES; j < classes; j += LANES) raise(&greatest, &AT(c + j));
    float max = greatest[0];
    for (size_t l = 1; l < LANES; l++) max = greatest[l] > max ? greatest[l] : max;
    for (size_t j = 0; j < classes; j += LANES) {
        lanes value = AT(c + j) - max;
        exp_negative(&value);
        AT(c + j) = value, sums += value;
    }
    float divisor = 1.f / total(&sums);
    for (size_t j = 0; j < classes; j++, u += dim, s += dim)
        for (size_t e = 0; e < dim; e += LANES) AT(s + e) += divisor * c[j] * AT_CONST(u + e);
}

INLINE void squash(const float *s, float *v, size_t classes, size_t dim) {
    for (size_t j = 0; j < classes; j++, s += dim, v += dim) {
        lanes squares = {0};
        for (size_t e = 0; e < dim; e += LANES) squares += AT_CONST(s + e) * AT_CONST(s + e);
        float square = total(&squares), factor = sqrtf(square) / (1.f + square);
        for (size_t e = 0; e < dim; e += LANES) AT(v + e) = AT_CONST(s + e) * factor;
    }
}

INLINE uint8_t ones(uint8_t v) {
    v = (uint8_t)(v - ((v >> 1) & 0x55));
    v = (uint8_t)((v & 0x33) + ((v >> 2) & 0x33));
    return (v + (v >> 4)) & 0x0f;
}

/* p[e] = n - 2 popcount(w[e] XOR x), the sum of the products of n <= 8 signs; where `add` is set, added to p[e] */
INLINE void sums_portable(const uint8_t *restrict w, uint8_t x, int n, int add, int8_t *restrict p, size_t size) {
    for (size_t e = 0; e < size; e++) p[e] = (int8_t)((add ? p[e] : 0) + n - 2 * ones(w[e] ^ x));
}

INLINE void widen_portable(const int8_t *p, float *to) {
    for (size_t e = 0; e < LANES; e++) to[e] = (float)p[e];
}

/* 8 values to a byte */
INLINE uint8_t signs8_portable(const float *x) {
    unsigned bits = 0;
    for (int k = 0; k < 8; k++) bits |= (unsigned)(x[k] > 0.f) << k;
    return (uint8_t)bits;
}

#if defined(__x86_64__)
#include <immintrin.h>
#define TARGET_SIMD __attribute__((target("avx2,fma,popcnt")))
#define TARGET_WIDE __attribute__((target("avx2,fma,popcnt,avx512f,avx512bw,avx512vl,avx512dq,avx512bitalg")))

TARGET_SIMD static inline void sums_simd(
        const uint8_t *restrict w, uint8_t x, int n, int add, int8_t *restrict p, size_t size) {
    /* -2 popcount of each nibble */
    const __m256i table = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -2, -2, -4, -2, -4, -4, -6, -2, -4, -4, -6, -4, -6, -6, -8));
    const __m256i low = _mm256_set1_epi8(15), signs = _mm256_set1_epi8((char)x), all = _mm256_set1_epi8((char)n);
    size_t e = 0;
    for (; e + 32 <= size; e += 32) {
        __m256i *to = (__m256i *)(p + e), v = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)(w + e)), signs);
        __m256i sum = _mm256_add_epi8(all, _mm256_shuffle_epi8(table, _mm256_and_si256(v, low)));
        sum = _mm256_add_epi8(sum, _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(v, 4), low)));
        _mm256_storeu_si256(to, add ? _mm256_add_epi8(_mm256_loadu_si256(to), sum) : sum);
    }
    sums_portable(w + e, x, n, add, p + e, size - e);
}

TARGET_WIDE static inline void sums_wide(
        const uint8_t *restrict w, uint8_t x, int n, int add, int8_t *restrict p, size_t size) {
    const __m512i signs = _mm512_set1_epi8((char)x), all = _mm512_set1_epi8((char)n);
    for (size_t e = 0; e < size; e += 64) {
        __mmask64 some = size - e < 64 ? ((__mmask64)1 << (size - e)) - 1 : ~(__mmask64)0;
        __m512i count = _mm512_popcnt_epi8(_mm512_xor_si512(_mm512_maskz_loadu_epi8(some, w + e), signs));
        __m512i sum = _mm512_sub_epi8(all, _mm512_add_epi8(count, count));
        if (add) sum = _mm512_add_epi8(sum, _mm512_maskz_loadu_epi8(some, p + e));
        _mm512_mask_storeu_epi8(p + e, some, sum);
    }
}

TARGET_SIMD static inline void widen_simd(const int8_t *p, float *to) {
    __m128i all = _mm_loadu_si128((const __m128i *)p);
    _mm256_storeu_ps(to, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(all)));
    _mm256_storeu_ps(to + 8, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(all, 8))));
}

TARGET_WIDE static inline void widen_wide(const int8_t *p, float *to) {
    _mm512_storeu_ps(to, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p))));
}

TARGET_SIMD static inline uint8_t signs8_simd(const float *x) {
    return (uint8_t)_mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(x), _mm256_setzero_ps(), _CMP_GT_OQ));
}

/* Each path that a processor has, it has with those before it. */
static const char *const PATHS[] = {"portable", "avx2", "avx512"};

static int best_path(void) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("popcnt"))
        return PORTABLE;
    int wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bitalg");
    return wide ? WIDE : SIMD;
}
#elif defined(__aarch64__)
#include <arm_neon.h>
#define TARGET_SIMD
#define TARGET_WIDE
#define sums_wide sums_simd
#define widen_wide widen_simd

INLINE void sums_simd(const uint8_t *restrict w, uint8_t x, int n, int add, int8_t *restrict p, size_t size) {
    size_t e = 0;
    for (; e + 16 <= size; e += 16) {
        int8x16_t count = vreinterpretq_s8_u8(vcntq_u8(veorq_u8(vld1q_u8(w + e), vdupq_n_u8(x))));
        int8x16_t sum = vsubq_s8(vdupq_n_s8((int8_t)n), vaddq_s8(count, count));
        vst1q_s8(p + e, add ? vaddq_s8(vld1q_s8(p + e), sum) : sum);
    }
    sums_portable(w + e, x, n, add, p + e, size - e);
}

INLINE void widen_simd(const int8_t *p, float *to) {
    int8x16_t all = vld1q_s8(p);
    int16x8_t halves[2] = {vmovl_s8(vget_low_s8(all)), vmovl_s8(vget_high_s8(all))};
    for (int part = 0; part < 4; part++) {
        int16x8_t half = halves[part / 2];
        vst1q_f32(to + 4 * part, vcvtq_f32_s32(vmovl_s16(part % 2 ? vget_high_s16(half) : vget_low_s16(half))));
    }
}

INLINE uint8_t signs8_simd(const float *x) {
    static const uint32_t places[8] = {1, 2, 4, 8, 16, 32, 64, 128};
    uint32x4_t a = vandq_u32(vcgtq_f32(vld1q_f32(x), vdupq_n_f32(0.f)), vld1q_u32(places));
    uint32x4_t b = vandq_u32(vcgtq_f32(vld1q_f32(x + 4), vdupq_n_f32(0.f)), vld1q_u32(places + 4));
    return (uint8_t)vaddvq_u32(vaddq_u32(a, b));
}

static const char *const PATHS[] = {"portable", "neon"};

static int best_path(void) { return SIMD; }
#else
#define TARGET_SIMD
#define TARGET_WIDE
#define sums_simd sums_portable
#define sums_wide sums_portable
#define widen_simd widen_portable
#define widen_wide widen_portable
#define signs8_simd signs8_portable

static const char *const PATHS[] = {"portable"};

static int best_path(void) { return PORTABLE; }
#endif

INLINE void sums(int path, const uint8_t *w, uint8_t x, int n, int add, int8_t *p, size_t size) {
    if (path == WIDE) sums_wide(w, x, n, add, p, size);
    else if (path == SIMD) sums_simd(w, x, n, add, p, size);
    else sums_portable(w, x, n, add, p, size);
}

/* 16 bytes to floats */
INLINE void widen(int path, const int8_t *p, lanes *to) {
    if (path == WIDE) widen_wide(p, (float *)to);
    else if (path == SIMD) widen_simd(p, (float *)to);
    else widen_portable(p, (float *)to);
}

/* n values to bytes, each `stride` behind the one before */
INLINE void pack_signs(int path, const float *x, uint8_t *bytes, size_t stride, size_t n) {
    for (size_t k = 0; k < n; k += 8, bytes += stride) {
        float tail[8] = {0};
        if (n - k < 8) memcpy(tail, x + k, (n - k) * sizeof(float));
        const float *from = n - k < 8 ? tail : x + k;
        *bytes = path == PORTABLE ? signs8_portable(from) : signs8_simd(from);
    }
}
