package guest

import "github.com/pgark/terraform-provider-pgark/internal/engine/job"

// SudoersRemedy is the command by which root lets an account deploy over SSH: package remote runs these two commands and
// no other as root.
func SudoersRemedy(user string, l job.Layout) string {
	lib := l.LibDirectory()
	return "printf '%s\\n' '" + user + " ALL=(root) NOPASSWD: /usr/bin/install -D -m 0755 /dev/stdin " + lib + "/incoming/pgark' '" +
		user + " ALL=(root) NOPASSWD: " + lib + "/*/pgark guest' | install -m 0440 /dev/stdin /etc/sudoers.d/pgark"
}
