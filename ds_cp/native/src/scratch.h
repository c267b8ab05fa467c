// A thread's own room, kept from call to call and freed when the thread ends.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

namespace ds_cp {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  // At least `bytes` bytes at a multiple of 64. What was there is lost when it grows.
  char* need(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      data_ = static_cast<char*>(std::aligned_alloc(64, (bytes + 4095) / 4096 * 4096));
      if (!data_) throw std::bad_alloc();
      size_ = (bytes + 4095) / 4096 * 4096;
    }
    return data_;
  }

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
};

// Hands out pieces of a stretch of memory one after the other, each at a multiple of 64. With a null
// stretch it only counts.
class Pieces {
 public:
  explicit Pieces(char* begin) : begin_(begin) {}
  template <class T>
  T* take(size_t count) {
    char* found = begin_ ? begin_ + used_ : nullptr;
    used_ += (count * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<T*>(found);
  }
  size_t used() const { return used_; }

 private:
  char* begin_;
  size_t used_ = 0;
};

}  // namespace ds_cp
