/* Included before everything else when llama.cpp is compiled (llama-cpp.build.sh). GCC before 12.4, 13.3 and 14 tells
   the compiler that `_tile_loadconfig` reads 8 bytes, where the processor reads 64: the other 56 are never written, and
   the first product with AMX ends the program (GCC bug 114098). Here the instruction reads what it reads. */
#if defined(__AMX_TILE__)
#include <immintrin.h>
#undef _tile_loadconfig
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg\t%0" ::"m"(*(const char(*)[64])(config)))
#endif
