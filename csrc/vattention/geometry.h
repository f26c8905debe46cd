// Sizes and addresses of a cache as arithmetic.
#pragma once

#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <string>

namespace vattention {

using Address = std::uint64_t;

// One reserved range is cut into regions, a region into slots, a slot into rows of one page:
//
//   region 0                     region 1
//   | slot 0    | slot 1    |..  | slot 0    | slot 1    |..
//   |p0|p1|p2|..|p0|p1|p2|..     |p0|p1|p2|..|p0|p1|p2|..
//     ^ row 1 of slot 0 is this page in every region ^
//
// A slot starts on a page and its tokens lie side by side across pages: the bytes of a token need not divide a page,
// and a slot's last page may be partly unused.
class Geometry {
 public:
  Geometry(std::uint64_t num_regions, std::uint64_t token_bytes, std::uint64_t num_slots, std::uint64_t max_tokens,
           std::uint64_t page_bytes)
      : num_regions_(positive("num_regions", num_regions)),
        token_bytes_(positive("token_bytes", token_bytes)),
        num_slots_(positive("num_slots", num_slots)),
        max_tokens_(positive("max_tokens", max_tokens)),
        page_bytes_(positive("page_bytes", page_bytes)) {
    if (token_bytes > page_bytes) {
      throw std::invalid_argument("a page of " + std::to_string(page_bytes) +
                                  " bytes is smaller than one token, which takes " + std::to_string(token_bytes) +
                                  " bytes in a region: page_bytes must be at least that");
    }
    checked_product(page_bytes, num_regions);
    slot_rows_ = rows_for(checked_product(max_tokens, token_bytes) / token_bytes);
    total_bytes_ = checked_product(checked_product(slot_bytes(), num_slots), num_regions);
  }

  std::uint64_t num_regions() const noexcept { return num_regions_; }
  std::uint64_t token_bytes() const noexcept { return token_bytes_; }
  std::uint64_t num_slots() const noexcept { return num_slots_; }
  std::uint64_t max_tokens() const noexcept { return max_tokens_; }
  std::uint64_t page_bytes() const noexcept { return page_bytes_; }
  std::uint64_t row_bytes() const noexcept { return num_regions_ * page_bytes_; }
  std::uint64_t slot_rows() const noexcept { return slot_rows_; }
  std::uint64_t slot_bytes() const noexcept { return slot_rows_ * page_bytes_; }
  std::uint64_t region_bytes() const noexcept { return num_slots_ * slot_bytes(); }
  std::uint64_t total_bytes() const noexcept { return total_bytes_; }

  // tokens <= max_tokens, or the product may not fit 64 bits.
  std::uint64_t rows_for(std::uint64_t tokens) const noexcept {
    return (tokens * token_bytes_ + page_bytes_ - 1) / page_bytes_;
  }

  // The largest number of tokens up to `tokens` that ends with a page: these pages hold no other token.
  std::uint64_t whole_page_tokens(std::uint64_t tokens) const noexcept {
    const std::uint64_t period_tokens = page_bytes_ / std::gcd(page_bytes_, token_bytes_);
    return tokens - tokens % period_tokens;
  }

  // Distance of a page from the base of the reserved range.
  std::uint64_t offset_of(std::uint64_t region, std::uint64_t slot, std::uint64_t row) const noexcept {
    return region * region_bytes() + slot * slot_bytes() + row * page_bytes_;
  }

 private:
  static std::uint64_t positive(const char* name, std::uint64_t value) {
    if (value == 0) throw std::invalid_argument(std::string(name) + " must be at least 1, got 0");
    return value;
  }

  static std::uint64_t checked_product(std::uint64_t a, std::uint64_t b) {
    constexpr std::uint64_t kAddressable = std::uint64_t{1} << 62;  // leaves room to round up
    if (a > kAddressable / b) throw std::invalid_argument("the cache would span more than 2^62 bytes of address space");
    return a * b;
  }

  std::uint64_t num_regions_, token_bytes_, num_slots_, max_tokens_, page_bytes_;
  std::uint64_t slot_rows_ = 0, total_bytes_ = 0;
};

}  // namespace vattention
