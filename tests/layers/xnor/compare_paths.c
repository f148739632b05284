/* Each path of xnor.c against portable C, on sizes of all kinds: prints the paths, returns 1 where they differ. */
#include "xnor.c"

#include <stdio.h>

static uint32_t state = 1;
static uint32_t draw(void) { return state = state * 1664525u + 1013904223u; }
static float uniform(void) { return (float)(draw() >> 8) / (float)(1 << 24) - .5f; }

static int compare(int kind, size_t batch, size_t capsules, size_t in_dim, size_t classes, size_t dim) {
    size_t row = classes * dim, in = batch * capsules * (kind == XNIDR ? row : in_dim), out = batch * row;
    size_t weights = capsules * ((in_dim + 7) / 8) * row, size = kind == PRODUCTS ? out * capsules : out * sizeof(float);
    float *x = malloc(in * sizeof(float)), *scale = malloc(capsules * row * sizeof(float));
    uint8_t *bits = malloc(weights), *expected = malloc(size), *found = malloc(size);
    int wrong = 0;
    for (size_t i = 0; i < in; i++) x[i] = draw() % 4 ? uniform() : 0.f;
    for (size_t i = 0; i < capsules * row; i++) scale[i] = .3f + uniform() / 2.f;
    for (size_t i = 0; i < weights; i++) {
        size_t last = i / row % ((in_dim + 7) / 8) == (in_dim + 7) / 8 - 1 ? (in_dim + 7) % 8 + 1 : 8;
        bits[i] = (uint8_t)(draw() >> 16) & (uint8_t)((1 << last) - 1);
    }
    for (int path = PORTABLE; xnor_path(path); path++) {
        memset(found, 255, size);
        wrong |= xnor_run(
            path, kind, x, bits, scale, path == PORTABLE ? expected : found, batch, capsules, in_dim, classes, dim, 3,
            0, batch);
        for (size_t i = 0; path != PORTABLE && i < size / (kind == PRODUCTS ? 1 : sizeof(float)); i++) {
            if (kind == PRODUCTS) wrong |= found[i] != expected[i];
            else wrong |= !(fabsf(((float *)found)[i] - ((float *)expected)[i]) <= 1e-5f);
        }
    }
    free(x), free(scale), free(bits), free(expected), free(found);
    return wrong;
}

int main(void) {
    int wrong = 0;
    for (int path = 0; xnor_path(path); path++) printf("%s ", xnor_path(path));
    for (int kind = PRODUCTS; kind <= XNIDR; kind++) {
        wrong |= compare(kind, 4, 5, 8, 3, 16);
        wrong |= compare(kind, 3, 4, 13, 33, 16);
        wrong |= compare(kind, 11, 3, 24, 5, 32);
        wrong |= compare(kind, 9, 3, 127, 4, 8);
        wrong |= compare(kind, 2, 20, 8, 100, 16);
        wrong |= compare(kind, 1, 2, 1, 1, 24);
    }
    return wrong;
}
