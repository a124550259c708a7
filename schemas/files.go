package schemas

// FileInfo is a file of a task's folder as a list shows it.
type FileInfo struct {
	Name     string `json:"name"`
	Type     string `json:"type"` // file, folder, link or other
	Size     int64  `json:"size"`
	Mode     string `json:"mode"`            // octal
	Modified int64  `json:"modified"`        // seconds since 1970
	Target   string `json:"target,omitzero"` // of a link
}

// FileList is a folder of a task, by name.
type FileList struct {
	Path  string     `json:"path"`
	Items []FileInfo `json:"items"`
	More  bool       `json:"more,omitzero"` // there are more than come in one list
}

// MaxFileList is how many files one list has.
const MaxFileList = 10_000

// FilesDone is what a put or a delete has done.
type FilesDone struct {
	Path    string `json:"path"`
	Entries int    `json:"entries"` // files, folders and links
	Bytes   int64  `json:"bytes"`
}

// FilesSkipped is what a folder's archive lacks.
type FilesSkipped struct {
	Skipped []FileSkipped `json:"skipped"`
	More    int           `json:"more,omitzero"` // so many more
}

// FileSkipped is one thing that an archive lacks, and why.
type FileSkipped struct {
	Path string `json:"path"`
	Why  string `json:"why"`
}

// FilesOpen is what a session with a task's files is to do. An archive or the bytes of a
// file come and go on channel 0; the agent's last frame is a FilesEnd on ChannelControl.
type FilesOpen struct {
	Path      string `json:"path"`
	Mode      uint32 `json:"mode,omitzero"`      // of a put: of the one file
	Archive   bool   `json:"archive,omitzero"`   // of a put: a tar archive comes, and not one file's bytes
	Recursive bool   `json:"recursive,omitzero"` // of a delete: a folder with what is in it, too
	Entries   int    `json:"entries,omitzero"`   // of a list: so many at the most
}

// FilesEnd is how a session with a task's files ended. Nothing has changed if it has a Code.
type FilesEnd struct {
	Code    Code          `json:"code,omitzero"`
	Message string        `json:"message,omitzero"` // a sentence for people
	Entries int           `json:"entries,omitzero"`
	Bytes   int64         `json:"bytes,omitzero"`
	Skipped []FileSkipped `json:"skipped,omitzero"`
	More    int           `json:"more,omitzero"`

	Unknown Unknown `json:",embed"`
}
