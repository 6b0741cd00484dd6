// How many operations on bytes two threads of this processor can do, with nothing to read: what no product can pass.
//
//     gcc -O3 -funroll-all-loops -mavx512f -mavx512vnni -pthread scripts/peak_int8.c -o peak && ./peak
//
// A VPDPBUSD is 64 products and as many sums. 12 accumulators, for its latency.
#include <immintrin.h>
#include <pthread.h>
#include <stdio.h>
#include <time.h>

enum { ACCUMULATORS = 12, TIMES = 200000000, THREADS = 2 };

static void* work(void* out) {
  __m512i sums[ACCUMULATORS], x = _mm512_set1_epi8(3), w = _mm512_set1_epi8(2);
  for (int i = 0; i < ACCUMULATORS; i++) sums[i] = _mm512_set1_epi32(i);
  for (long n = 0; n < TIMES; n++) {
    __asm__ volatile("" : "+v"(x));  // or the compiler takes all rounds together
    for (int i = 0; i < ACCUMULATORS; i++) sums[i] = _mm512_dpbusd_epi32(sums[i], x, w);
  }
  for (int i = 1; i < ACCUMULATORS; i++) sums[0] = _mm512_add_epi32(sums[0], sums[i]);
  *(int*)out = _mm512_reduce_add_epi32(sums[0]);
  return NULL;
}

int main(void) {
  struct timespec before, after;
  pthread_t threads[THREADS];
  int outs[THREADS];
  clock_gettime(CLOCK_MONOTONIC, &before);
  for (int i = 0; i < THREADS; i++) pthread_create(&threads[i], NULL, work, &outs[i]);
  for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
  clock_gettime(CLOCK_MONOTONIC, &after);
  double seconds = after.tv_sec - before.tv_sec + 1e-9 * (after.tv_nsec - before.tv_nsec);
  printf("%.2f * 10^12 operations a second\n", 1e-12 * THREADS * TIMES * ACCUMULATORS * 128 / seconds);
}
