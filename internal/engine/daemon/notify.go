package daemon

import (
	"context"
	"fmt"
	"time"

	sd "github.com/coreos/go-systemd/v22/daemon"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
)

// notify keeps systemd informed, where it started us: ready as soon as requests are answered, whatever the state, since
// a repository that is away is no reason to restart us; and alive as long as the state can be read.
func (d *daemon) notify(ctx context.Context) {
	d.send(sd.SdNotifyReady)
	d.tell()
	every, err := sd.SdWatchdogEnabled(false)
	if err != nil || every == 0 {
		<-ctx.Done()
	} else {
		tick := time.NewTicker(every / 3)
		defer tick.Stop()
		for alive := true; alive; {
			select {
			case <-ctx.Done():
				alive = false
			case <-tick.C:
				d.current() // hangs with us if we hang
				d.send(sd.SdNotifyWatchdog)
			}
		}
	}
	d.send(sd.SdNotifyStopping)
}

// tell shows the state in systemctl status.
func (d *daemon) tell() {
	d.mu.Lock()
	text := string(d.state)
	if d.state == control.Running {
		text = fmt.Sprintf("protecting %s of job %s", d.o.Instance, d.o.Job)
	} else if d.problem != "" {
		text += ": " + d.problem
	}
	d.mu.Unlock()
	d.send("STATUS=" + text)
}

func (d *daemon) send(state string) {
	if _, err := sd.SdNotify(false, state); err != nil {
		d.log.Warn("notify systemd", "error", err)
	}
}
