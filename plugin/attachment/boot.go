package attachment

import (
	"fmt"
	"os"
	"strings"
)

// BootID is the id that the kernel gave itself at this boot.
func BootID() (string, error) {
	data, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read the boot id: %w", err)
	}
	return strings.TrimSpace(string(data)), nil
}
