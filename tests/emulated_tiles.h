// AMX's tiles for CPUs that have none, included before a kernel by emulate_tiles() of
// compiled_kernels.py. Intrinsics do to the letter what Intel's manual says; nothing is quick.
#pragma once
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#undef _tile_loadconfig
#undef _tile_storeconfig
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbusd
#undef _tile_zero
#define _tile_loadconfig emulated_tiles::load_config
#define _tile_storeconfig emulated_tiles::store_config
#define _tile_loadd emulated_tiles::load
#define _tile_stored emulated_tiles::store
#define _tile_dpbf16ps emulated_tiles::multiply
#define _tile_dpbusd emulated_tiles::multiply_bytes
#define _tile_zero emulated_tiles::clear
#define __AMX_TILE__ 1
#define __AMX_BF16__ 1

// The CPU says that it has tiles, and Linux that they may be used.
#define __get_cpuid_count(leaf, subleaf, a, b, c, d) (*(a) = *(b) = *(c) = *(d) = ~0u, 1)
#define syscall(...) 0L

// By this symbol a library says that it was compiled with this file.
extern "C" __attribute__((visibility("default"))) int has_emulated_tiles() { return 1; }

namespace emulated_tiles {

constexpr int ROWS = 16, ROW_BYTES = 64;

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64, "what the instructions read and write");

static thread_local Config config{};
static thread_local unsigned char tiles[8][ROWS][ROW_BYTES];

// What would be an invalid instruction or a fault ends the process.
static void require(bool holds) {
  if (!holds) std::abort();
}

static void load_config(const void* from) {
  std::memcpy(&config, from, sizeof config);
  require(config.palette <= 1);
  std::memset(tiles, 0, sizeof tiles);
}

static void store_config(void* to) { std::memcpy(to, &config, sizeof config); }

static void require_tile(int tile) {
  require(config.palette == 1 && tile >= 0 && tile < 8);
  require(config.rows[tile] <= ROWS && config.row_bytes[tile] <= ROW_BYTES);
}

static void load(int tile, const void* from, ptrdiff_t stride) {
  require_tile(tile);
  std::memset(tiles[tile], 0, sizeof tiles[tile]);
  for (int r = 0; r < config.rows[tile]; r++) {
    std::memcpy(tiles[tile][r], static_cast<const char*>(from) + r * stride,
                config.row_bytes[tile]);
  }
}

static void store(int tile, void* to, ptrdiff_t stride) {
  require_tile(tile);
  for (int r = 0; r < config.rows[tile]; r++) {
    std::memcpy(static_cast<char*>(to) + r * stride, tiles[tile][r], config.row_bytes[tile]);
  }
}

static float number(const unsigned char* bfloat16) {
  uint32_t bits = 0;
  std::memcpy(reinterpret_cast<char*>(&bits) + 2, bfloat16, 2);
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// sums[m][n] += rows[m][2k] * columns[k][2n] + rows[m][2k + 1] * columns[k][2n + 1]
static void multiply(int sums, int rows, int columns) {
  for (int tile : {sums, rows, columns}) require_tile(tile);
  require(sums != rows && sums != columns && rows != columns);
  for (int m = 0; m < config.rows[sums]; m++) {
    for (int n = 0; n < config.row_bytes[sums] / 4; n++) {
      float sum;
      std::memcpy(&sum, &tiles[sums][m][4 * n], sizeof sum);
      for (int k = 0; k < config.row_bytes[rows] / 4; k++) {
        for (int half = 0; half < 4; half += 2) {
          sum += number(&tiles[rows][m][4 * k + half]) * number(&tiles[columns][k][4 * n + half]);
        }
      }
      std::memcpy(&tiles[sums][m][4 * n], &sum, sizeof sum);
    }
  }
}

static void clear(int tile) {
  require_tile(tile);
  std::memset(tiles[tile], 0, sizeof tiles[tile]);
}

// sums[m][n] += the products of rows[m][4k … 4k + 3], unsigned, and columns[k][4n … 4n + 3], signed
static void multiply_bytes(int sums, int rows, int columns) {
  for (int tile : {sums, rows, columns}) require_tile(tile);
  require(sums != rows && sums != columns && rows != columns);
  for (int m = 0; m < config.rows[sums]; m++) {
    for (int n = 0; n < config.row_bytes[sums] / 4; n++) {
      int32_t sum;
      std::memcpy(&sum, &tiles[sums][m][4 * n], sizeof sum);
      for (int k = 0; k < config.row_bytes[rows] / 4; k++) {
        for (int i = 0; i < 4; i++) {
          sum += tiles[rows][m][4 * k + i] * static_cast<int8_t>(tiles[columns][k][4 * n + i]);
        }
      }
      std::memcpy(&tiles[sums][m][4 * n], &sum, sizeof sum);
    }
  }
}

}  // namespace emulated_tiles
