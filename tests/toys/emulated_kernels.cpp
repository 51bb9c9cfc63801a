// The CPU kernels as a program for another processor, which an emulator runs: calls come on the
// standard input, each with the memory that it reads and writes; results go to the standard output.

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include <unistd.h>

extern "C" {
int64_t loki_select(const void* params);
int64_t loki_attend(const void* params);
int64_t loki_update_pages(const void* params);
#ifndef _OPENMP  // one thread, and no C++ library that runs destructors when it ends
int __cxa_thread_atexit(void (*)(void*), void*, void*) { return 0; }
int omp_get_thread_num(void) { return 0; }
int omp_get_num_threads(void) { return 1; }
#endif
}

namespace {

using Kernel = int64_t (*)(const void*);
constexpr Kernel kKernels[] = {loki_select, loki_attend, loki_update_pages};

// What precedes a call's words: indices of those that are addresses, the parameters, the memory.
struct Header {
  int64_t kernel, addresses, words, bytes;
};

void read_all(void* to, int64_t bytes) {
  for (char* at = static_cast<char*>(to); bytes > 0;) {
    int64_t got = read(0, at, static_cast<size_t>(bytes));
    if (got <= 0) _exit(got == 0 ? 0 : 1);
    at += got;
    bytes -= got;
  }
}

void write_all(const void* from, int64_t bytes) {
  for (const char* at = static_cast<const char*>(from); bytes > 0;) {
    int64_t put = write(1, at, static_cast<size_t>(bytes));
    if (put <= 0) _exit(2);
    at += put;
    bytes -= put;
  }
}

}  // namespace

int main() {
  for (;;) {
    Header header;
    read_all(&header, sizeof(header));
    int64_t index_bytes = header.addresses * 8, word_bytes = header.words * 8;
    int64_t* index = static_cast<int64_t*>(std::malloc(index_bytes + word_bytes));
    int64_t* word = index + header.addresses;
    read_all(index, index_bytes + word_bytes);
    void* memory = std::aligned_alloc(64, (header.bytes + 63) & ~int64_t{63});
    read_all(memory, header.bytes);
    for (int64_t i = 0; i < header.addresses; ++i) {
      word[index[i]] += reinterpret_cast<int64_t>(memory);
    }
    int64_t missing = kKernels[header.kernel](word);
    write_all(&missing, sizeof(missing));
    write_all(memory, header.bytes);
    std::free(memory);
    std::free(index);
  }
}
