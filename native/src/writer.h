// Lays out the sections of a blob, and writes them to memory that the caller allocates.
#pragma once
#include <cstring>
#include <vector>

#include "blob.h"

namespace secateur {

class BlobWriter {
 public:
  BlobWriter(uint32_t format, uint32_t value, int64_t rows, int64_t cols) {
    std::memset(&header_, 0, sizeof header_);
    std::memcpy(header_.magic, kMagic, sizeof kMagic);
    header_.format = format;
    header_.value = value;
    header_.rows = static_cast<uint32_t>(rows);
    header_.cols = static_cast<uint32_t>(cols);
    end_ = sizeof(Header);
  }

  Header& header() { return header_; }

  // Adds the next section. Its data must stay alive until finish().
  void add(const void* data, size_t bytes, size_t slack = 0) {
    header_.section[count_++] = end_;
    parts_.push_back({data, bytes});
    end_ = static_cast<uint64_t>(round_up(static_cast<int64_t>(end_ + bytes + slack), kAlign));
  }
  template <class T>
  void add(const std::vector<T>& v, size_t slack = 0) {
    add(v.data(), v.size() * sizeof(T), slack);
  }

  int finish(sct_allocate allocate, void* context) {
    for (int i = count_; i < 7; i++) header_.section[i] = end_;
    header_.bytes = end_;
    auto* out = static_cast<uint8_t*>(allocate(context, static_cast<int64_t>(end_)));
    if (!out) return SCT_NO_MEMORY;
    std::memcpy(out, &header_, sizeof header_);
    uint64_t at = sizeof header_;
    for (int i = 0; i <= count_; i++) {
      // Slack and padding are zeroed: equal weights give equal files.
      uint64_t begin = i < count_ ? header_.section[i] : end_;
      std::memset(out + at, 0, begin - at);
      if (i == count_) break;
      if (parts_[i].bytes) std::memcpy(out + begin, parts_[i].data, parts_[i].bytes);
      at = begin + parts_[i].bytes;
    }
    return SCT_OK;
  }

 private:
  struct Part {
    const void* data;
    size_t bytes;
  };
  Header header_;
  std::vector<Part> parts_;
  int count_ = 0;
  uint64_t end_;
};

}  // namespace secateur
