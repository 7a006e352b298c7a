// Numbers out of NF4 blocks of 64: level * the block's largest. Plain twin: NF4.dequantize of ops/quant_nf4.py.
#include <stdint.h>
#include <string.h>

enum { BLOCK = 64, SECOND = 256 };

// codes [blocks][32], the first number in the high half of its byte. tops: fp32 [blocks]; or, where `map` is given, uint8:
// a largest is map[code] * second[block / 256] + offset. levels: the 16. out [blocks * 64].
void nf4_dequantize(const uint8_t *codes, const void *tops, const float *second, const float *map, const float *levels,
                    float *out, float offset, int64_t blocks, int threads) {
  float pairs[256][2];  // a byte's two levels
  for (int byte = 0; byte < 256; byte++) pairs[byte][0] = levels[byte >> 4], pairs[byte][1] = levels[byte & 15];
#pragma omp parallel for num_threads(threads)
  for (int64_t b = 0; b < blocks; b++) {
    const float top = map ? map[((const uint8_t *)tops)[b]] * second[b / SECOND] + offset : ((const float *)tops)[b];
    const uint8_t *from = codes + b * (BLOCK / 2);
    float block[BLOCK], *to = out + b * BLOCK;
    for (int i = 0; i < BLOCK / 2; i++) memcpy(block + 2 * i, pairs[from[i]], sizeof pairs[0]);
    for (int i = 0; i < BLOCK; i++) to[i] = block[i] * top;
  }
}
