/* What xnor.c has for each kind of processor: products of packed signs, and packing.
 *
 * `..._fast` is AVX2 (compiled for any x86-64, called where the processor has it), NEON, or else the portable one.
 */
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

INLINE uint8_t ones(uint8_t v) {
    v = (uint8_t)(v - ((v >> 1) & 0x55));
    v = (uint8_t)((v & 0x33) + ((v >> 2) & 0x33));
    return (v + (v >> 4)) & 0x0f;
}

/* STREAM is STORE past the caches, for u at a multiple of 32 bytes */
enum { STORE, ADD, STREAM };

/* u[e] = P factor alpha[e], or added to u, where P is the sum of the products of n <= 8 signs: those of the byte w[e] with
 * those of x */
INLINE void products_portable(
        const uint8_t *restrict w, uint8_t x, int n, float factor, const float *restrict alpha, int how,
        float *restrict u, size_t size) {
    for (size_t e = 0; e < size; e++) {
        float value = (float)(n - 2 * ones(w[e] ^ x)) * (factor * alpha[e]);
        u[e] = how == ADD ? u[e] + value : value;
    }
}

/* 8 values to a byte */
INLINE uint8_t signs8_portable(const float *x) {
    unsigned bits = 0;
    for (int k = 0; k < 8; k++) bits |= (unsigned)(x[k] > 0.f) << k;
    return (uint8_t)bits;
}

#if defined(__x86_64__)
#include <immintrin.h>
#define FAST "avx2"
#define STREAM_END() _mm_sfence()
#define TARGET __attribute__((target("avx2,fma")))

TARGET static inline void products_fast(
        const uint8_t *restrict w, uint8_t x, int n, float factor, const float *restrict alpha, int how,
        float *restrict u, size_t size) {
    /* -2 popcount of each nibble */
    const __m256i table = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -2, -2, -4, -2, -4, -4, -6, -2, -4, -4, -6, -4, -6, -6, -8));
    const __m256i low = _mm256_set1_epi8(15), signs = _mm256_set1_epi8((char)x), all = _mm256_set1_epi8((char)n);
    size_t e = 0;
    for (; e + 32 <= size; e += 32) {
        __m256i v = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)(w + e)), signs);
        __m256i p = _mm256_add_epi8(all, _mm256_shuffle_epi8(table, _mm256_and_si256(v, low)));
        p = _mm256_add_epi8(p, _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(v, 4), low)));
        for (int part = 0; part < 4; part++) {
            __m128i half = part < 2 ? _mm256_castsi256_si128(p) : _mm256_extracti128_si256(p, 1);
            if (part % 2) half = _mm_srli_si128(half, 8);
            float *to = u + e + 8 * part;
            __m256 scale = _mm256_mul_ps(_mm256_set1_ps(factor), _mm256_loadu_ps(alpha + e + 8 * part));
            __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(half)), scale);
            if (how == STREAM) _mm256_stream_ps(to, value);
            else _mm256_storeu_ps(to, how == ADD ? _mm256_add_ps(_mm256_loadu_ps(to), value) : value);
        }
    }
    products_portable(w + e, x, n, factor, alpha + e, how, u + e, size - e);
}

TARGET static inline uint8_t signs8_fast(const float *x) {
    return (uint8_t)_mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(x), _mm256_setzero_ps(), _CMP_GT_OQ));
}
#elif defined(__aarch64__)
#include <arm_neon.h>
#define FAST "neon"
#define STREAM_END()
#define TARGET

INLINE void products_fast(
        const uint8_t *restrict w, uint8_t x, int n, float factor, const float *restrict alpha, int how,
        float *restrict u, size_t size) {
    size_t e = 0;
    for (; e + 16 <= size; e += 16) {
        int8x16_t count = vreinterpretq_s8_u8(vcntq_u8(veorq_u8(vld1q_u8(w + e), vdupq_n_u8(x))));
        int8x16_t p = vsubq_s8(vdupq_n_s8((int8_t)n), vaddq_s8(count, count));
        int16x8_t halves[2] = {vmovl_s8(vget_low_s8(p)), vmovl_s8(vget_high_s8(p))};
        for (int part = 0; part < 4; part++) {
            int16x8_t half = halves[part / 2];
            float32x4_t f = vcvtq_f32_s32(vmovl_s16(part % 2 ? vget_high_s16(half) : vget_low_s16(half)));
            float *to = u + e + 4 * part;
            float32x4_t value = vmulq_f32(f, vmulq_n_f32(vld1q_f32(alpha + e + 4 * part), factor));
            vst1q_f32(to, how == ADD ? vaddq_f32(vld1q_f32(to), value) : value);
        }
    }
    products_portable(w + e, x, n, factor, alpha + e, how, u + e, size - e);
}

INLINE uint8_t signs8_fast(const float *x) {
    static const uint32_t places[8] = {1, 2, 4, 8, 16, 32, 64, 128};
    uint32x4_t a = vandq_u32(vcgtq_f32(vld1q_f32(x), vdupq_n_f32(0.f)), vld1q_u32(places));
    uint32x4_t b = vandq_u32(vcgtq_f32(vld1q_f32(x + 4), vdupq_n_f32(0.f)), vld1q_u32(places + 4));
    return (uint8_t)vaddvq_u32(vaddq_u32(a, b));
}
#else
#define FAST "portable"
#define STREAM_END()
#define TARGET
#define products_fast products_portable
#define signs8_fast signs8_portable
#endif

INLINE void products(
        int fast, const uint8_t *w, uint8_t x, int n, float factor, const float *alpha, int how, float *u, size_t size) {
    if (fast) products_fast(w, x, n, factor, alpha, how, u, size);
    else products_portable(w, x, n, factor, alpha, how, u, size);
}

/* n values to bytes, each `stride` behind the one before */
INLINE void pack_signs(int fast, const float *x, uint8_t *bytes, size_t stride, size_t n) {
    for (size_t k = 0; k < n; k += 8, bytes += stride) {
        float tail[8] = {0};
        if (n - k < 8) memcpy(tail, x + k, (n - k) * sizeof(float));
        const float *from = n - k < 8 ? tail : x + k;
        *bytes = fast ? signs8_fast(from) : signs8_portable(from);
    }
}
