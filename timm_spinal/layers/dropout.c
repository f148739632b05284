/* Dropout on joined inputs with numpy's random numbers: one pass instead of joining, drawing, comparing and multiplying.
 * For GCC and Clang, called through ctypes; no header of Python, numpy or torch.
 */
#include <string.h>

#include "vectors.h"

#define DRAWS 512  /* numbers drawn at a time */
#define PER_DRAW 4 /* values that a number of 64 bits decides on, in the order in which they lie in memory */

/* the start of numpy's bitgen_t, its interface for extensions */
struct bitgen {
    void *state;
    uint64_t (*next_uint64)(void *state);
};

struct stream {
    struct bitgen *source;
    size_t draws; /* that are left */
    uint16_t values[DRAWS * PER_DRAW];
    size_t used, drawn;
};

INLINE void drop_some(
        const float *x, const uint16_t *random, uint16_t threshold, float scale, float *out, uint8_t *keep, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint8_t kept = random[i] >= threshold;
        keep[i] = kept;
        out[i] = x[i] * (kept ? scale : 0.f);
    }
}

INLINE void scale_some(float *gradient, const uint8_t *keep, float scale, size_t n) {
    for (size_t i = 0; i < n; i++) gradient[i] *= keep[i] ? scale : 0.f;
}

#if defined(__x86_64__)
#define TARGET __attribute__((target("avx2")))
TARGET static void drop_some_wide(
        const float *x, const uint16_t *random, uint16_t threshold, float scale, float *out, uint8_t *keep, size_t n) {
    drop_some(x, random, threshold, scale, out, keep, n);
}

TARGET static void scale_some_wide(float *gradient, const uint8_t *keep, float scale, size_t n) {
    scale_some(gradient, keep, scale, n);
}

static int is_wide(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2");
}
#else
#define drop_some_wide drop_some
#define scale_some_wide scale_some
static int is_wide(void) { return 0; }
#endif

static void draw(struct stream *s) {
    size_t count = s->draws < DRAWS ? s->draws : DRAWS;
    for (size_t i = 0; i < count; i++) {
        uint64_t number = s->source->next_uint64(s->source->state);
        memcpy(s->values + i * PER_DRAW, &number, sizeof number);
    }
    s->draws -= count;
    s->drawn = count * PER_DRAW;
    s->used = 0;
}

/* Joins parts (rows, widths[p]), row r at parts[p] + r * strides[p], to out (rows, sum of widths), dropping each value
 * where a random number of 16 bits is under the threshold; keep is 1 where it is not. */
EXPORT void dropout_join(
        struct bitgen *source, size_t rows, size_t count, const float *const *parts, const size_t *strides,
        const size_t *widths, uint16_t threshold, float scale, float *out, uint8_t *keep) {
    struct stream s = {.source = source};
    size_t total = 0;
    for (size_t p = 0; p < count; p++) total += widths[p];
    s.draws = (rows * total + PER_DRAW - 1) / PER_DRAW;
    int wide = is_wide();
    for (size_t r = 0; r < rows; r++)
        for (size_t p = 0; p < count; p++) {
            const float *x = parts[p] + r * strides[p];
            for (size_t left = widths[p], n; left; left -= n, x += n, out += n, keep += n) {
                if (s.used == s.drawn) draw(&s);
                n = left < s.drawn - s.used ? left : s.drawn - s.used;
                (wide ? drop_some_wide : drop_some)(x, s.values + s.used, threshold, scale, out, keep, n);
                s.used += n;
            }
        }
}

/* gradient (rows, width), contiguous: times the scale where keep, whose rows lie keep_stride apart, is 1, else 0 */
EXPORT void dropout_scale_gradient(
        float *gradient, const uint8_t *keep, size_t keep_stride, float scale, size_t rows, size_t width) {
    int wide = is_wide();
    for (size_t r = 0; r < rows; r++)
        (wide ? scale_some_wide : scale_some)(gradient + r * width, keep + r * keep_stride, scale, width);
}
