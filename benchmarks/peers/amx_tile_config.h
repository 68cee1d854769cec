/* Included before everything else when llama.cpp is compiled for AMX (llama-cpp.sh). GCC 12.2 believes that
   `_tile_loadconfig` reads 8 bytes, where the processor reads 64. It drops stores to the other 56, and the first product
   with AMX ends the program. Newer versions of GCC have a builtin instead. Here the instruction reads what it reads. */
#if defined(__AMX_TILE__)
#include <immintrin.h>
#undef _tile_loadconfig
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg\t%0" ::"m"(*(const char(*)[64])(config)))
#endif
