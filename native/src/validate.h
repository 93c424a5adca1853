// Validates packed weights of unknown origin, so that no kernel follows an index out of bounds.
#pragma once
#include "blob.h"

namespace secateur {

// Whether the format exists, and exists with the value type.
bool format_is_known(const Header& h);

// Whether every index inside a blob with a checked header stays inside. May throw std::bad_alloc.
bool is_valid(const uint8_t* blob);

}  // namespace secateur
