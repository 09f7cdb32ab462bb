package kernel_test

import (
	"fmt"

	"github.com/dockway/dockway/driver/plan"
)

func macvlan(n int, lower string) plan.Macvlan {
	return plan.Macvlan{Name: fmt.Sprintf("dwm%d", n), Alias: fmt.Sprintf("dockway network=%d", n), Lower: lower, MAC: plan.MAC{2, 3, 0, 0, byte(n >> 8), byte(n)}, MTU: 1500, Up: true}
}
